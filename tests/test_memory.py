"""Streaming needs memory for the points, not for the pairs."""
import json, os, subprocess, sys

import pytest

# Peak resident memory of one fresh process, above what it held after its imports.
CODE = """
import json, resource, sys, time, warnings
import torch
from flash_sinkhorn_hessian import solve
warnings.simplefilter('ignore')
torch.set_num_threads(2)
n, m, d, dtype, passes = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4]), int(sys.argv[5])
g = torch.Generator().manual_seed(0)
x, y = torch.rand(n, d, generator=g).to(dtype), torch.rand(m, d, generator=g).to(dtype) + .1
before, t = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
s = solve(x, y, eps=.3*d, tol=1e-3, max_iter=passes, backend='streaming')
value, grad = s.value, s.grad('x')
h = s.hvp(torch.randn(n, d, generator=g).to(dtype), max_iter=3, tol=1e-2)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(dict(mib=(peak - before)/1024, seconds=time.time() - t, backend=s.backend, finite=bool(h.isfinite().all() and grad.isfinite().all() and value.isfinite()), n_iter=s.n_iter)))
"""

def measure(n, m, d, dtype='float32', passes=20, **env):
    done = subprocess.run([sys.executable, '-c', CODE, *map(str, (n, m, d, dtype, passes))], text=True, capture_output=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got['backend'] == 'streaming' and got['finite']
    return got

def test_no_array_of_pairs():
    "Not even an array of one byte a pair would fit the bound."
    n = 12_000
    got = measure(n, n, 3)
    assert got['mib'] < 128 < n*n/2**20, got

@pytest.mark.slow
@pytest.mark.parametrize('n,m,d,dtype,bound', [(20_000, 20_000, 3, 'float32', 128), (20_000, 12_000, 3, 'float64', 128), (12_000, 12_000, 40, 'float32', 400)])
def test_no_array_of_pairs_other_shapes(n, m, d, dtype, bound):
    "In high dimension, up to 256 MiB of costs may be kept."
    got = measure(n, m, d, dtype)
    assert got['mib'] < bound < n*m*4/2**20, got

@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_fifty_thousand_points_in_one_gibibyte(dtype):
    got = measure(50_000, 50_000, 3, dtype)
    assert got['mib'] < 1024, got

@pytest.mark.parametrize('backend', ['dense', 'streaming'])
def test_nothing_waits_for_the_garbage_collector(backend, young_heap):
    "What a solve, its derivatives and a training step made is freed when they are: an object and its transpose are no ring."
    import gc
    import torch
    from flash_sinkhorn_hessian import SamplesLoss, divergence, solve
    x, y = torch.rand(30, 3, dtype=torch.float64), torch.rand(40, 3, dtype=torch.float64)
    def second_order(sol): sol.value; sol.grad('x'); sol.grad('y'); sol.hvp(torch.ones_like(x)); sol.hvp(torch.ones_like(y), ('x', 'y'))
    def training():
        z = x.clone().requires_grad_(); g, = torch.autograd.grad(SamplesLoss(blur=.3, backend=backend)(z, y), z, create_graph=True)
        torch.autograd.grad(g.square().sum(), z)
    jobs = dict(solve=lambda: second_order(solve(x, y, eps=.1, backend=backend)), relaxed=lambda: second_order(solve(x, y, eps=.1, reach=.5, backend=backend)),
                divergence=lambda: second_order(divergence(x, y, eps=.1, backend=backend)), hessian=lambda: solve(x, y, eps=.1, backend=backend).hessian(('x', 'b')), training=training)
    for name, job in jobs.items():
        job(); gc.collect(); gc.disable()
        try: gc.set_debug(gc.DEBUG_SAVEALL); job(); gc.collect(); left = [type(o).__name__ for o in gc.garbage if isinstance(o, torch.Tensor) or type(o).__module__.startswith('flash_sinkhorn')]
        finally: gc.set_debug(0); gc.garbage.clear(); gc.enable()
        assert not left, (name, left)
