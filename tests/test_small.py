"""The loop in C and the float64 end of small problems: sizes, dimensions, weights, batches, threads against the dense reference."""
import itertools, math, warnings

import pytest
import torch

import flash_sinkhorn_hessian.sinkhorn as base
from flash_sinkhorn_hessian import divergence, solve
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.dual_energy import DenseGeometry, Problem
from flash_sinkhorn_hessian.streaming import CompiledGeometry, StreamingGeometry, compiled_kernel

needs_cc = pytest.mark.skipif(compiled_kernel(3, torch.float64, True) is None, reason='no C compiler')
D64, D32 = torch.float64, torch.float32

def points(n, m, d, dtype, batch=None, zeros=False, seed=0):
    q = random_problem(n, m, d, seed, batch=batch)
    if zeros:
        for w, k in ((q['a'], n), (q['b'], m)):
            w[..., ::3] = 0 if k > 3 else w[..., ::3]; w /= w.sum(-1, keepdim=True)
    q['x'], q['y'] = (q[k].to(dtype).double() for k in 'xy')
    return q

@needs_cc
@pytest.mark.parametrize('dtype,tol', [(D64, 1e-13), (D32, 1e-6)])
@pytest.mark.parametrize('n,m,d,batch,eps', [(37, 53, 3, None, .05), (1, 9, 1, None, .1), (9, 1, 2, None, .1), (130, 17, 8, None, .1), (64, 64, 12, None, .2), (33, 40, 64, None, 1.),
                                             (20, 31, 3, 5, .02), (7, 6, 20, 3, .3), (300, 400, 2, None, .01), (60, 70, 3, None, 1e-4)])
def test_the_loop_is_the_loop(n, m, d, batch, eps, dtype, tol):
    "k iterations in C are k alternating iterations, for kept and for recomputed kernels, one thread or two, zero weights included."
    q = points(n, m, d, dtype, batch, zeros=True); D = DenseGeometry(q['x'], q['y'], eps); p = Problem(D, q['a'], q['b']); f, g, errs = 0*p.a, 0*p.b, []
    for _ in range(6): f, g, e = base.alternate(p, f, g); errs.append(e)
    size = D.cost.max().item()/eps*tol
    for room, threads in itertools.product((0, 1 << 22), (1, 2)):
        S = StreamingGeometry(q['x'].to(dtype), q['y'].to(dtype), eps); S.ROOM = room; old = torch.get_num_threads()
        try: torch.set_num_threads(threads); f1, g1, e1 = S.iterate(Problem(S, q['a'], q['b']), 0*p.a, 0*p.b, 6)
        finally: torch.set_num_threads(old)
        assert ((f1 - f)/eps).abs().max() < 4*size and ((g1 - g)/eps).abs().max() < 4*size and (e1 - torch.stack(errs))[1:].nan_to_num().abs().max() < 4*size and e1.isfinite().all()   # the reference's own error has 0 times inf in it

@needs_cc
def test_no_start_is_too_far():
    "Potentials that are off by thousands of eps, in either direction, are found again."
    q = points(40, 50, 3, D32); S = StreamingGeometry(q['x'].float(), q['y'].float(), 1e-3); p = Problem(S, q['a'], q['b']); want = S.iterate(p, 0*p.a, 0*p.b, 3)
    for shift in (-1e4, -50., 50., 1e4):
        f, g, e = S.iterate(p, 0*p.a, 0*p.b + shift*p.eps, 3); assert torch.allclose(f + shift*p.eps, want[0], atol=1e-5) and torch.allclose(g - shift*p.eps, want[1], atol=1e-5)
    wild = 100*p.eps*torch.randn(50, generator=torch.Generator().manual_seed(0)).double(); f, g, e = S.iterate(p, 0*p.a, wild, 3)
    D = Problem(DenseGeometry(S.x, S.y, p.eps), p.a, p.b); F, G = 0*p.a, wild
    for _ in range(3): F, G, _ = base.alternate(D, F, G)
    assert torch.allclose(f, F, atol=1e-5) and torch.allclose(g, G, atol=1e-5)

@pytest.mark.parametrize('kw', [{}, dict(reach=.5), dict(reach_x=.3)], ids=str)
@pytest.mark.parametrize('front', [solve, divergence])
@pytest.mark.parametrize('n,m,d,batch,eps', [(37, 53, 3, None, .05), (60, 40, 20, None, .3), (12, 15, 2, 4, .1), (280, 290, 2, None, .02)])
def test_small_float32_is_as_exact_as_its_dtype(n, m, d, batch, eps, front, kw):
    "A start in float32 leaves no trace: value, gradient and product as from float64, up to the rounding of the results."
    q = points(n, m, d, D32, batch, zeros=not kw); single = {k: t.float() for k, t in q.items()}; double = {k: t.double() for k, t in single.items()}
    with warnings.catch_warnings():
        warnings.simplefilter('error'); s, w = front(**single, eps=eps, **kw), front(**double, eps=eps, backend='dense', **kw)
    v = torch.randn(q['x'].shape, generator=torch.Generator().manual_seed(1)); close = lambda got, want: ((got.double() - want).norm()/want.norm()).item()
    assert s.backend == 'dense' and s.converged and close(s.value, w.value) < 3e-7 and close(s.grad(), w.grad()) < 1e-6 and close(s.hvp(v), w.hvp(v.double())) < 5e-6

@needs_cc
def test_what_auto_takes():
    x, y = torch.rand(30, 3), torch.rand(40, 3)
    assert isinstance(solve(x, y, eps=.1).problem.geom, CompiledGeometry) and isinstance(solve(x, y, eps=.1, backend='dense').problem.geom, DenseGeometry)
    assert solve(x, y, eps=.1, backend='streaming').problem.geom.dtype == D32

def test_counts_and_callback():
    "The start in float32 counts: n_iter, history and callback see one solve, and max_iter bounds the sum."
    q = random_problem(60, 50, dtype=D32); seen = []; s = solve(**q, eps=.01, callback=lambda n, eps, e: seen.append(n))
    assert s.n_iter >= max(seen) and seen == sorted(seen) and [h[0] for h in s.info.history] == seen
    with pytest.warns(Warning, match='max_iter=3'): few = solve(**q, eps=.01, max_iter=3)
    assert not few.converged and few.n_iter <= 20 and math.isfinite(few.marginal_error)

@pytest.mark.parametrize('backend', ['auto', 'dense', 'streaming'])
@pytest.mark.parametrize('kw', [{}, dict(reach=1.), dict(reach_x=.7), dict(max_iter=1), dict(max_iter=7)], ids=str)
@pytest.mark.parametrize('seed', range(6))
def test_the_last_error_heard_is_the_answers(seed, kw, backend):
    "Whatever ended the solve: a Sinkhorn step after a Newton step, an earlier way that was the better one, a single point, or no iterations left."
    r = torch.Generator().manual_seed(seed); n, m = [(40, 40), (1, 7), (9, 1), (1, 1), (33, 20), (20, 33)][seed]; seen = []
    x, y = torch.rand(n, 2, generator=r, dtype=D64), torch.rand(m, 2, generator=r, dtype=D64); eps = 10**torch.empty(()).uniform_(-3, 0, generator=r).item()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); s = solve(x, y, eps=eps, backend=backend, callback=lambda *a: seen.append(a), **kw)
    assert seen[-1][1:] == (s.inputs.eps, s.marginal_error) and seen[-1][0] <= s.n_iter and (seen[-1][2] <= s.tol) == s.converged

@pytest.mark.parametrize('reach', [{}, dict(reach=.5), dict(reach_x=.5), dict(reach_y=.5)])
@pytest.mark.parametrize('n,m', [(8, 11), (30, 40)])
def test_small_problems_at_a_small_eps_converge(n, m, reach):
    "A mean cost of thousands of eps, weights that differ: every backend that runs on a CPU gets there, and to the same value."
    for seed in (3, 5, 10):
        g = torch.Generator().manual_seed(seed); x, y = torch.randn(n, 2, generator=g).double(), .7*torch.randn(m, 2, generator=g).double() + .3; a, b = (torch.rand(k, generator=g).double() + .05 for k in (n, m))
        for eps in (1e-3, 1e-4):
            with warnings.catch_warnings(): warnings.simplefilter('error'); s, t = (solve(x, y, a/a.sum(), b/b.sum(), eps=eps, backend=k, **reach) for k in ('auto', 'dense'))
            assert s.converged and t.converged and abs(s.value - t.value) < 1e-8*(1 + abs(t.value)), (seed, eps)

@pytest.mark.parametrize('seed', [17, 85, 189, 197, 332, 372])
def test_one_support_two_weightings(seed):
    "A level that overlooks a light point without a partner leaves Newton a slope of thousands of steps."
    g = torch.Generator().manual_seed(seed); n = [6, 12, 20, 30][seed % 4]
    x = torch.randn(n, [2, 5][seed % 2], generator=g, dtype=torch.float64); a = torch.rand(n, generator=g, dtype=torch.float64) + .1; a /= a.sum()
    s = solve(x, x.clone(), a, None, eps=[.01, .005][(seed//4) % 2]*((x[:, None] - x[None])**2).sum(-1).mean().item())
    assert s.converged and s.n_iter < 500, s
