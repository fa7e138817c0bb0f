"""Unequal totals under penalties that hardly bend, and totals far from one: the constant between the potentials is thousands of eps."""
import itertools, os, subprocess, sys, warnings
import pytest, torch

from flash_sinkhorn_hessian import divergence, solve

def problem(n, m, d, A, B, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed); u = lambda *s: torch.rand(*s, generator=gen, dtype=torch.float64)
    x, y, a, b = u(n, d), u(m, d) + .3, u(n) + .1, u(m) + .1
    return [t.to(dtype) for t in (x, y, a*A/a.sum(), b*B/b.sum())]

def relative(got, want): return ((got.double() - want).norm()/want.norm()).item()

@pytest.mark.parametrize('backend,dtype', [('streaming', torch.float32), ('streaming', torch.float64), ('dense', torch.float64), ('auto', torch.float32)])
def test_against_a_tight_solution(backend, dtype):
    for (d, eps), (A, B), reach in itertools.product(((2, .1), (6, .01)), ((1, 2), (20, 30), (1e-6, 3e-6)), (.3, 3., 30., 300.)):
        q = problem(30, 25, d, A, B, dtype); exact = [t.double() for t in q]; v = torch.ones_like(q[0]).cumsum(0)
        s = solve(*q, eps=eps, reach=reach, backend=backend); want = solve(*exact, eps=eps, reach=reach, backend='dense', tol=1e-9*max(A, B))
        assert s.converged and want.converged, (A, B, eps, reach, s)
        bounds = (1e-4, 1e-3) if dtype == torch.float32 else (1e-7, 1e-6)
        assert relative(s.grad(), want.grad()) < bounds[0] and relative(s.hvp(v), want.hvp(v.double())) < bounds[1], (A, B, eps, reach, relative(s.grad(), want.grad()), relative(s.hvp(v), want.hvp(v.double())))

def test_small_totals_do_not_loosen_the_answer():
    for make, mass in itertools.product((solve, divergence), (1e-4, 1e-8)):
        q = problem(20, 25, 2, mass, mass, torch.float64); s, want = make(*q, eps=.05, reach=.5), make(*q, eps=.05, reach=.5, tol=1e-13*mass, max_iter=500)
        assert relative(s.grad(), want.grad()) < 1e-7, (make, mass)

TRITON = '''
import sys, torch, warnings; sys.path.insert(0, 'tests'); torch.set_num_threads(1)
from test_stiff_penalties import problem, relative
from flash_sinkhorn_hessian import solve
for reach in (10., 300.):
    q = problem(12, 14, 3, 1, 2, torch.float32); v = torch.ones_like(q[0]).cumsum(0)
    s, want = solve(*q, eps=.05, reach=reach, backend="triton", max_iter=300), solve(*(t.double() for t in q), eps=.05, reach=reach, backend="dense")
    got = relative(s.grad(), want.grad()), relative(s.hvp(v), want.hvp(v.double())), relative(s.hvp(v), want.hvp(v.double())), relative(s.plan(), want.plan())
    assert s.converged and max(got) < 1e-5, (reach, got)
from test_stiff_penalties import scattered
for size in (24., 150.):
    q, v = scattered(size, torch.float32, 9, 11); s, want = solve(*q, eps=.05, reach=1., backend="triton"), solve(*(t.double() for t in q), eps=.05, reach=1., backend="dense", tol=1e-13)
    assert relative(s.grad(), want.grad()) < 1e-3 and relative(s.hvp(v), want.hvp(v.double())) < 1e-3, size
print("ok")
'''

def test_triton_kernels():
    pytest.importorskip('triton')
    run = subprocess.run([sys.executable, '-c', TRITON], env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert run.returncode == 0 and run.stdout.strip().endswith('ok'), run.stdout + run.stderr

def scattered(size, dtype, n=18, m=20, seed=18):
    gen = torch.Generator().manual_seed(seed); u = lambda *s: torch.rand(*s, generator=gen)
    x, y, a, b, v = size*u(n, 3), size*u(m, 3), u(n) + .1, u(m) + .1, torch.randn(n, 3, generator=gen)
    return [t.to(dtype) for t in (x, y, a/a.sum(), b/b.sum())], v.to(dtype)

@pytest.mark.parametrize('backend,dtype,bound', [('streaming', torch.float32, 1e-2), ('auto', torch.float32, 1e-5), ('streaming', torch.float64, 1e-8), ('dense', torch.float64, 1e-8)])
@pytest.mark.parametrize('size', [5., 24., 50., 150.])
def test_marginals_too_light_for_single_precision(size, backend, dtype, bound):
    "Clouds so far apart for their reach that some points send e^-90 of their mass, or e^-900: costs of 1e6 eps, of which float32 knows a tenth of an eps."
    q, v = scattered(size, dtype); s = solve(*q, eps=.05, reach=1., backend=backend); want = solve(*(t.double() for t in q), eps=.05, reach=1., backend='dense', tol=1e-13)
    assert torch.isfinite(s.hvp(v)).all() and relative(s.grad(), want.grad()) < bound and relative(s.hvp(v), want.hvp(v.double())) < bound
    both = solve(*(torch.stack([t, u]) for t, u in zip(q, scattered(1., dtype)[0])), eps=.05, reach=1., backend=backend); h = both.hvp(torch.stack([v, v]))      # and they do no harm to a neighbour in the batch
    want = solve(*(t.double() for t in scattered(1., dtype)[0]), eps=.05, reach=1., backend='dense', tol=1e-13); assert relative(h[1], want.hvp(v.double())) < (1e-5 if dtype == torch.float32 else 1e-9)

def test_the_solution_owns_its_weights():
    x, y, a = torch.rand(5, 2).double(), torch.rand(5, 2).double(), torch.full((5,), .1).double()
    s = solve(x, y, a, None, eps=.1, reach=1.); want, plan = s.hvp(y), s.plan(); a.mul_(3)
    assert torch.equal(s.hvp(y), want) and torch.equal(s.plan(), plan)
