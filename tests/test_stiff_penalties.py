"""Unequal totals under penalties that hardly bend, and totals far from one: the constant between the potentials is thousands of eps."""
import itertools, warnings
import pytest, torch
from quick import interpreted

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

@pytest.mark.parametrize('k', [1, 3, 6])
@pytest.mark.parametrize('backend,dtype,bound', [('streaming', torch.float32, 5e-6), ('auto', torch.float32, 1e-6), ('streaming', torch.float64, 1e-9)])
def test_totals_far_apart(k, backend, dtype, bound):
    "The default tolerance is of the mass that the plan has, not of the larger total."
    q = problem(20, 25, 3, 10.**k, 10.**-k, dtype); s = solve(*q, eps=.05, reach=1., backend=backend); want = solve(*(t.double() for t in q), eps=.05, reach=1., backend='dense', tol=1e-13)
    v = torch.ones_like(q[0]).cumsum(0); assert s.converged and max(relative(s.grad(u), want.grad(u)) for u in 'xy') < bound and relative(s.hvp(v), want.hvp(v.double())) < bound

@pytest.mark.parametrize('backend,dtype,bound', [('streaming', torch.float32, 5e-6), ('auto', torch.float32, 1e-6), ('streaming', torch.float64, 1e-9), ('dense', torch.float64, 1e-9)])
@pytest.mark.parametrize('make', [solve, divergence])
def test_a_batch_is_its_problems_one_by_one(make, backend, dtype, bound):
    "Scales that differ by 30 and masses that differ by a million: each problem to its own tolerance."
    one = problem(20, 25, 3, 1, 1, dtype); x, y, a, b = (torch.stack([t, t]) for t in one); big, light = torch.tensor([1., 30.]).to(dtype)[:, None, None], torch.tensor([1e-6, 1.]).to(dtype)[:, None]
    for q, kw in (((big*x, big*y, a, b), {}), ((big*x, big*y, a, b), dict(reach=1.)), ((x, y, light*a, light*b), dict(reach=1.))):
        s, v = make(*q, eps=.05, backend=backend, **kw), torch.ones_like(x).cumsum(1); want = make(*(t[0].double() for t in q), eps=.05, backend='dense', **kw, tol=1e-13*q[2][0].sum().item())
        assert s.converged and relative(s.grad()[0], want.grad()) < bound and relative(s.hvp(v)[0], want.hvp(v[0].double())) < bound, kw

@pytest.mark.parametrize('backend,dtype,bound', [('streaming', torch.float32, 3e-4), ('auto', torch.float32, 5e-6), ('streaming', torch.float64, 1e-9), ('dense', torch.float64, 1e-9)])
@pytest.mark.parametrize('shift', [1., 3., 4.5])
def test_little_mass_is_left(shift, backend, dtype, bound):
    "Clouds out of each other's reach: down to 1e-8 of the mass is transported, and that to the same relative error, alone and beside a problem that keeps all of it."
    near = problem(20, 25, 2, 1, 1, dtype); far = [near[0], near[1] + shift, *near[2:]]; seen = []
    s = solve(*far, eps=.02, reach=1., backend=backend, callback=lambda *a: seen.append(a)); both = solve(*(torch.stack([t, u]) for t, u in zip(near, far)), eps=.02, reach=1., backend=backend)
    want = solve(*(t.double() for t in far), eps=.02, reach=1., backend='dense', tol=1e-20, max_iter=300)
    assert s.converged and both.converged and relative(s.grad(), want.grad()) < bound and relative(both.grad()[1], want.grad()) < bound and relative(s.hvp(far[0]), want.hvp(far[0].double())) < 10*bound
    assert seen[-1][2] == s.marginal_error and [k for k, *_ in seen] == sorted(k for k, *_ in seen) and seen[-1][0] <= s.n_iter

@pytest.mark.parametrize('make', [solve, divergence])
@pytest.mark.parametrize('scale,eps', [(1e-3, .05), (1., 1e6), (1., 2.5), (1., 8.)])
def test_eps_above_all_costs(scale, eps, make):
    "Single precision would know the value to 1e-7 eps only."
    x, y, *_ = problem(60, 70, 3, 1, 1, torch.float32); x, y = x*scale, y*scale
    for backend, kw in itertools.product(('streaming', 'auto'), ({}, dict(reach=1.))):
        s, want = make(x, y, eps=eps, backend=backend, **kw), make(x.double(), y.double(), eps=eps, backend='dense', **kw); v = torch.ones_like(x)
        assert abs(s.value/want.value - 1) < 5e-6 and relative(s.grad('a'), want.grad('a')) < 1e-5 and s.value.dtype == s.hvp(v).dtype == torch.float32, (backend, kw)

@pytest.mark.parametrize('wide,thin', [(4, 1), (8, 1), (1, 8), (16, 1), (4, 4)])
def test_mass_that_has_far_to_go(wide, thin):
    "Rounding of large transported costs is no failure; where it spoils second derivatives, that is said."
    gen, off = torch.Generator().manual_seed(0), []
    for _ in range(6): # a single draw may be unlucky
        x, y = wide*torch.rand(60, 3, generator=gen), thin*torch.rand(70, 3, generator=gen)
        with warnings.catch_warnings(): warnings.simplefilter('error'); s = solve(x, y, eps=.05, backend='streaming'); h = s.hvp(x)
        want = solve(x.double(), y.double(), eps=.05, backend='dense'); assert relative(s.grad(), want.grad()) < 1e-4; off.append(relative(h, want.hvp(x.double())))
    assert sum(off)/len(off) < 5e-3, off

@pytest.mark.parametrize('dtype,eps,said', [(torch.float32, 1e-2, False), (torch.float32, 2e-5, True), (torch.float64, 1e-6, False), (torch.float64, 1e-9, True)])
def test_few_digits_are_said(dtype, eps, said):
    gen = torch.Generator().manual_seed(2); x, y = (torch.rand(n, 2, generator=gen, dtype=torch.float64).to(dtype) for n in (6, 8))
    s = solve(x, y, eps=eps, backend='streaming')
    for use in (lambda: s.hvp(x), lambda: s.hessian()):
        with warnings.catch_warnings(record=True) as w: warnings.simplefilter('always'); use()
        assert any('hardly a digit' in str(o.message) for o in w) == said

TRITON = '''
import torch, warnings; torch.set_num_threads(1)
from test_stiff_penalties import problem, relative
from flash_sinkhorn_hessian import solve
for reach in (300.,):
    q = problem(12, 14, 3, 1, 2, torch.float32); v = torch.ones_like(q[0]).cumsum(0)
    s, want = solve(*q, eps=.05, reach=reach, backend="triton", max_iter=300), solve(*(t.double() for t in q), eps=.05, reach=reach, backend="dense")
    got = relative(s.grad(), want.grad()), relative(s.hvp(v), want.hvp(v.double())), relative(s.hvp(v), want.hvp(v.double())), relative(s.plan(), want.plan())
    assert s.converged and max(got) < 1e-5, (reach, got)
from test_stiff_penalties import scattered; from flash_sinkhorn_hessian.flash_sinkhorn import from_potentials
q, v = scattered(24., torch.float32, 9, 11); want = solve(*(t.double() for t in q), eps=.05, reach=1., backend="dense", tol=1e-13)
s = from_potentials(q[0], q[1], want.f.float(), want.g.float(), q[2], q[3], eps=.05, reach=1., backend="triton", tol=1e-2); assert relative(s.hvp(v), want.hvp(v.double())) < 3e-2
print("ok")
'''

def test_triton_kernels():
    pytest.importorskip('triton')
    run = interpreted(TRITON)
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
