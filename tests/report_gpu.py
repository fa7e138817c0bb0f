"""Accuracy and time of solve and hvp on a GPU, a line each. On a GPU machine: `PYTHONPATH=. python tests/report_gpu.py`."""
import time

import torch

from flash_sinkhorn_hessian import divergence, solve
from flash_sinkhorn_hessian.core import random_problem

def relative(got, want):
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu()).item()

def timed(fn):
    torch.cuda.synchronize(); start = time.perf_counter(); out = fn(); torch.cuda.synchronize()
    return out, time.perf_counter() - start

def accuracy(name, d, eps, make=solve, shift=0., size=1., **kw):
    "Float32 on the GPU against float64 on the CPU, n = m = 500, the same points."
    q = random_problem(500, 500, d, seed=1, dtype=torch.float32); v = size*torch.randn(500, d, generator=torch.Generator().manual_seed(0))
    q['x'], q['y'] = q['x'] + shift, q['y'] + shift
    s, w = make(*(t.cuda() for t in q.values()), eps=eps, **kw), make(*(t.double() for t in q.values()), eps=eps, **kw)
    print(f'{name}: {s.backend}, gradient {relative(s.grad(), w.grad()):.1e}, hvp {relative(s.hvp(v.cuda()), w.hvp(v.double())):.1e}, CG {s.cg_info.n_iter}', flush=True)

def speed(n, d, eps, **kw):
    "Uniform clouds in the unit cube: warm solve, first and later HVP, sixteen directions."
    g = torch.Generator('cuda').manual_seed(n + d); x, y = (torch.rand(n, d, device='cuda', generator=g) for _ in range(2))
    solve(x, y, eps=eps, **kw); s, t = timed(lambda: solve(x, y, eps=eps, **kw)); v = torch.randn(n, d, device='cuda', generator=g)
    first = timed(lambda: s.hvp(v, tol=1e-6))[1]; later = sorted(timed(lambda: s.hvp(v, tol=1e-6))[1] for _ in range(5))[2]; info = s.cg_info
    stack = timed(lambda: s.hvp(torch.randn(16, n, d, device='cuda', generator=g), tol=1e-6))[1] if n <= 10000 else float('nan')
    rows = (s.hvp(torch.ones_like(x)) - 2/n).abs().max().item()*n/2
    print(f'n={n} d={d} eps={eps:.4g}: solve {t:.3f} s ({s.n_iter} iterations, error {s.marginal_error:.1e}), hvp {1e3*first:.1f} then {1e3*later:.1f} ms '
          f'(CG {info.n_iter}, residual {info.residual:.1e}), 16 directions {1e3*stack:.1f} ms, row sums {rows:.1e}, peak {torch.cuda.max_memory_allocated()/2**20:.0f} MiB', flush=True)

if __name__ == '__main__':
    print(torch.cuda.get_device_name(), torch.__version__)
    for d, eps in ((3, .05), (3, .005), (16, .0533)): accuracy(f'd={d} eps={eps}', d, eps)
    accuracy('moved by 1000', 3, .005, shift=1000.); accuracy('direction 1e-6', 3, .005, size=1e-6)
    accuracy('divergence', 3, .05, divergence); accuracy('unbalanced', 3, .05, reach=.5); accuracy('semi-unbalanced, half cost', 3, .05, reach_x=.5, half_cost=True)
    for n, d, eps in ((10000, 64, .107), (10000, 3, .05), (10000, 3, .005)): speed(n, d, eps)
    speed(10000, 3, 5e-4, tol=1e-5); speed(200000, 3, .01, tol=1e-5)
