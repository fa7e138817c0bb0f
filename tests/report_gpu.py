"""Accuracy and time of solve and hvp on a GPU, a line each. On a GPU machine: `PYTHONPATH=. python tests/report_gpu.py`."""
import time

import torch

from flash_sinkhorn_hessian import divergence, solve
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.truncated import TruncatedGeometry

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
    "Uniform clouds in the unit cube: a warm solve, then products with new directions, one and sixteen at a time."
    g = torch.Generator('cuda').manual_seed(n + d); x, y = (torch.rand(n, d, device='cuda', generator=g) for _ in range(2))
    solve(x, y, eps=eps, **kw); s, t = timed(lambda: solve(x, y, eps=eps, **kw))
    geom = s._second.p.geom; pairs = f'{len(geom.kernel.col)/n:.0f} a row' if isinstance(geom, TruncatedGeometry) else 'all'; times, steps = [], []
    print(f'n={n} d={d} eps={eps:.4g}: solve {t:.3f} s, {s.n_iter} iterations, {s.info.newton_steps} Newton steps, marginal error {s.marginal_error:.1e}; pairs kept: {pairs}')
    for _ in range(24):
        v = torch.randn(n, d, device='cuda', generator=g); times.append(round(1e3*timed(lambda: s.hvp(v, tol=1e-6))[1], 2)); steps.append(s.cg_info.n_iter)
    rows = (s.hvp(torch.ones_like(x), tol=1e-6) - 2/n).abs().max().item()*n/2
    print(f'   hvp ms {times} CG steps {steps}, settled: {sorted(times[-9:])[4]} ms; largest row-sum error {rows:.1e}', flush=True)
    if n > 10000: return
    V = [torch.randn(16, n, d, device='cuda', generator=g) for _ in range(16)]
    print('   16 directions ms', [round(1e3*timed(lambda: s.hvp(v, tol=1e-6))[1], 2) for v in V], 'CG steps', s.cg_info.n_iter, flush=True)

if __name__ == '__main__':
    print(torch.cuda.get_device_name(), torch.__version__)
    for n, d, eps in ((10000, 3, .05), (10000, 3, .005), (10000, 64, .107)): speed(n, d, eps)
    speed(10000, 3, 5e-4, tol=1e-5); speed(200000, 3, .01, tol=1e-5)
    for d, eps in ((3, .05), (3, .005), (16, .0533)): accuracy(f'd={d} eps={eps}', d, eps)
    accuracy('moved by 1000', 3, .005, shift=1000.); accuracy('direction 1e-6', 3, .005, size=1e-6)
    accuracy('divergence', 3, .05, divergence); accuracy('unbalanced', 3, .005, reach=.5); accuracy('semi-unbalanced, half cost', 3, .05, reach_x=.5, half_cost=True)
