"""Other tiles for the half-step in sixty-four dimensions, a line each: milliseconds with so many programs wanted, and the largest difference from the configuration in use. On a GPU machine: `PYTHONPATH=. python tests/report_halfstep_gpu.py`.

What bounds the one in use: `PYTHONPATH=. ncu --clock-control none --kernel-name regex:"marginal_kernel|nvjet" --launch-skip 3 --launch-count 6 --section SpeedOfLight --section ComputeWorkloadAnalysis --section WarpStateStats --section Occupancy python tests/report_halfstep_gpu.py profile`."""
import math, sys

import torch

from flash_sinkhorn_hessian import kernels_softmin as kernels
from flash_sinkhorn_hessian.kernels_softmin import *

# rows and columns of a tile, warps, pipeline stages, and a bound for the registers
TILES = [(128, 128, 4, 2, None), (128, 64, 4, 2, None), (128, 64, 4, 2, 168), (128, 64, 4, 3, None), (128, 128, 4, 1, None), (128, 128, 4, 1, 168), (64, 128, 4, 2, None), (64, 128, 4, 1, None),
         (64, 64, 4, 2, None), (64, 64, 4, 3, None), (128, 128, 8, 2, None), (128, 128, 8, 1, None), (128, 64, 8, 2, None), (64, 128, 4, 2, 128), (128, 32, 4, 3, None)]

def cube(n, d=64):
    g = torch.Generator(device='cuda').manual_seed(n + d); x, y = (torch.rand(1, n, d, device='cuda', generator=g) for _ in 'xy'); x, y = x - x.mean(-2, True), y - y.mean(-2, True)
    s = prepare(x, y, .1*d/6, [t.norm(dim=-1).max().item() for t in (x, y)]); bias = column_bias(s, torch.full((1, n), -math.log(n), device='cuda').double())
    u = -row_lse(s, bias); return s, u, bias, torch.empty_like(u), torch.ones(3, device='cuda').double()

if __name__ == '__main__':
    print(torch.cuda.get_device_name(), torch.__version__)
    if sys.argv[1:] == ['profile']:
        args = cube(50000); A = torch.randn(8192, 8192, device='cuda').half()
        for _ in range(6): sweep(*args)
        for _ in range(3): A @ A.T
        torch.cuda.synchronize(); sys.exit()
    for n, wanted, reps in ((10000, (528, 792, 1056, 1188, 1584), 20), (50000, (1056, 2112, 4224), 4)):
        args = cube(n); want = sweep(*args).clone()
        for *tile, regs in TILES:
            kernels.most_registers = lambda *_: regs
            times = [(device_ms(lambda: sweep(*args, cfg=(*tile, k)), reps, 7), k) for k in wanted]
            print(f'n={n} tile {tile[0]} x {tile[1]}, {tile[2]} warps, {tile[3]} stages, registers {regs}:', ', '.join(f'{ms:.4f} ({k})' for ms, k in times), f'difference {(args[3] - want).abs().max().item():.0e}', flush=True)
