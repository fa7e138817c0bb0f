"""TorchSinkhornHessian and ImplicitDiff: exact answers, three methods that agree, options that mean what they say."""
from pathlib import Path

import numpy as np, pytest, torch

from flash_sinkhorn_hessian import ConvergenceWarning, TorchSinkhornHessian, divergence, solve
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.dual_energy import DenseGeometry
from flash_sinkhorn_hessian.implicit_diff_api import ImplicitDiff
from flash_sinkhorn_hessian.torch_sinkhorn_hessian import KeopsGeometry, keops_error

DATA = np.load(Path(__file__).with_name('reference.npz'))
VALUE, GRADIENT, HESSIAN = 1e-10, 1e-9, 1e-8

pytestmark = pytest.mark.usefixtures('one_thread')

def stored(case, key): return torch.from_numpy(np.array(DATA[f'{case}/{key}']))
def rel(got, want): return ((got - want).norm()/want.norm()).item()
def arguments(case): return [stored(case, k) for k in 'xyab'] + [float(DATA[f'{case}/eps'])]

cases = pytest.mark.parametrize('case', ['uniform', 'weighted'])
sizes = pytest.mark.parametrize('n,m', [(11, 17), (17, 11), (9, 9), (1, 5), (5, 1)])

@cases
@pytest.mark.parametrize('compile', [True, False])
def test_against_exact_answers(case, compile):
    solver = TorchSinkhornHessian(use_compile=compile)
    ot = solver.solve_ott(*arguments(case), 1e-13)
    assert rel(ot.reg_ot_cost, stored(case, 'ot_value')) <= VALUE and rel(ot.matrix, stored(case, 'P')) <= GRADIENT
    assert rel(ot.f, stored(case, 'f')) <= GRADIENT and rel(ot.g, stored(case, 'g')) <= GRADIENT
    assert rel(solver.dOTdx(ot), stored(case, 'ot_grad_x')) <= GRADIENT
    H = stored(case, 'ot_hess_xx')
    assert rel(solver.compute_hessian(ot), H) <= HESSIAN
    A = torch.randn(3, 15, 3, dtype=torch.float64)
    assert rel(solver.hessian_vector_product(ot, A, tau2=0.), torch.einsum('ikjl,sjl->sik', H, A)) <= HESSIAN

@cases
def test_three_methods(case):
    solver = TorchSinkhornHessian()
    for name in ('analytical', 'implicit', 'unroll'):
        assert rel(getattr(solver, f'hess_loss_{name}')(*arguments(case), 1e-11), stored(case, 'ot_hess_xx')) <= HESSIAN, name

@sizes
def test_methods_on_any_shape(n, m):
    p = random_problem(n, m, 2, seed=n); args = (*p.values(), .3, 1e-12)
    solver = TorchSinkhornHessian()
    want = solve(**p, eps=.3, tol=1e-13).hessian('x')
    for name in ('analytical', 'implicit', 'unroll'): assert rel(getattr(solver, f'hess_loss_{name}')(*args), want) <= HESSIAN, name
    A = torch.randn(n, 2, dtype=torch.float64); ot = solver.solve_ott(*args)
    assert (solver.hessian_vector_product(ot, A, 0) - torch.einsum('ikjl,jl->ik', want, A)).norm() <= HESSIAN*A.norm()

def test_tau2_is_the_documented_ridge():
    "The Schur complement is diag(c + eps tau2) - P^T diag(1/r) P: solved here densely, entry by entry."
    p = random_problem(17, 11); eps, tau2 = .1, 1e-2
    solver = TorchSinkhornHessian(); ot = solver.solve_ott(*p.values(), eps, 1e-13); P = ot.matrix
    r, c = P.sum(1), P.sum(0); T = (P @ p['y'])/r[:, None]
    A = torch.randn(17, 3, dtype=torch.float64)
    load = -2*(torch.einsum('ij,ijk,ik->j', P, p['y'] - T[:, None], A))
    S = (c + eps*tau2).diag() - P.T @ (P/r[:, None])
    null = c.sqrt()/c.sum().sqrt()                                   # in scaled unknowns
    R = c.rsqrt(); Q = torch.eye(11).double() - null[:, None]*null
    g = R*(torch.linalg.pinv(Q @ (R[:, None]*S*R) @ Q, hermitian=True, rtol=1e-12) @ (R*load))
    f = -(P @ g)/r; g = (load - P.T @ f)/c                           # one more update of the second potential follows the solve
    s = 2*torch.einsum('ijk,ik->ij', p['y'] - T[:, None], A) + g + f[:, None]
    want = 2*r[:, None]*A - 2/eps*torch.einsum('ij,ij,ijk->ik', P, s, p['y'] - T[:, None])
    assert rel(solver.hessian_vector_product(ot, A, tau2), want) <= HESSIAN
    assert rel(solver.hessian_vector_product(ot, A, 0.), want) > 1e-4

def test_zero_weight_and_translation():
    p = random_problem(13, 8); p['a'][0] = 0; p['a'] /= p['a'].sum()
    solver = TorchSinkhornHessian(); args = list(p.values())
    H = solver.hess_loss_analytical(*args, .1, 1e-12)
    assert torch.isfinite(H).all() and not H[0].any()
    args[0], args[1] = args[0] + 50., args[1] - 20.
    assert rel(solver.hess_loss_analytical(*args, .1, 1e-11), H) <= 1e-8
    with pytest.raises(ValueError, match='smallest weight'): solver.hess_loss_unroll(*args, .1, 1e-9)

def test_dtype_is_what_was_asked_for():
    p = random_problem(8, 9)
    for dtype in (torch.float32, torch.float64):
        solver = TorchSinkhornHessian(dtype=dtype); ot = solver.solve_ott(*p.values(), .1, 1e-5)
        for t in (ot.reg_ot_cost, ot.matrix, ot.f, ot.a, solver.dOTdx(ot), solver.compute_hessian(ot), solver.hessian_vector_product(ot, p['x'])): assert t.dtype == dtype

BAD = {'mu short': (dict(mu=torch.ones(3).double()/3), 'mu must have shape'), 'nu twice': (dict(nu=torch.ones(9).double()), 'nu must sum to 1'),
       'epsilon': (dict(epsilon=0.), 'epsilon must be positive'), 'threshold': (dict(threshold=-1.), 'threshold must be positive'),
       'list': (dict(x=[[0.]]), 'x must be a torch.Tensor'), 'integers': (dict(y=torch.ones(9, 3, dtype=torch.int64)), 'y must have a floating'),
       'batch': (dict(x=torch.zeros(2, 8, 3).double()), 'shape'), 'nan': (dict(x=torch.full((8, 3), torch.nan).double()), 'x must be finite')}
@pytest.mark.parametrize('name', BAD)
def test_bad_input(name):
    p = random_problem(8, 9); change, words = BAD[name]
    with pytest.raises((TypeError, ValueError), match=words):
        TorchSinkhornHessian().solve_ott(**(dict(x=p['x'], y=p['y'], mu=p['a'], nu=p['b'], epsilon=.1) | change))

def test_not_converged_is_said():
    p = random_problem(8, 9); solver = TorchSinkhornHessian()
    with pytest.warns(ConvergenceWarning): solver.solve_ott(*p.values(), .1, 1e-30)
    with pytest.warns(ConvergenceWarning, match='max_iter=2'): solver.hess_loss_unroll(*p.values(), .1, 1e-9, max_iter=2)
    with pytest.warns(ConvergenceWarning, match='max_cg_iter'): solver.hessian_vector_product(solver.solve_ott(*p.values(), .05), p['x'], 0, 1)

def test_keops_or_a_reason():
    "Where KeOps works, it gives the same answers; where it does not, asking for it is an error that says why."
    why, p = keops_error(), random_problem(14, 9)
    if why is not None:
        with pytest.raises(RuntimeError, match='use_keops=True needs a working KeOps'): TorchSinkhornHessian(use_keops=True)
        return
    a, b = TorchSinkhornHessian(use_keops=True), TorchSinkhornHessian()
    ot, want = (s.solve_ott(*p.values(), .1, 1e-12) for s in (a, b))
    assert ot.solution.problem.geom.name == 'keops' and rel(ot.reg_ot_cost, want.reg_ot_cost) <= VALUE
    assert rel(a.dOTdx(ot), b.dOTdx(want)) <= GRADIENT and rel(a.compute_hessian(ot), b.compute_hessian(want)) <= HESSIAN
    assert rel(a.hessian_vector_product(ot, p['x'], 0), b.hessian_vector_product(want, p['x'], 0)) <= HESSIAN
    K, D, g = KeopsGeometry(p['x'], p['y'], .3), DenseGeometry(p['x'], p['y'], .3), torch.Generator().manual_seed(0)
    u, v, A, B, al, be, V = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((14,), (9,), (2, 14, 4), (1, 9, 4), (2, 14), (2, 9), (9, 3)))
    assert rel(K.lse(v), D.lse(v)) <= VALUE and rel(K.apply(u, v, V), D.apply(u, v, V)) <= VALUE
    assert rel(K.weighted(u, v, A, B, al, be, V), D.weighted(u, v, A, B, al, be, V)) <= VALUE and rel(K.plan(u, v), D.plan(u, v)) <= VALUE

@sizes
@pytest.mark.parametrize('reach', [None, .7])
def test_implicit_diff_is_the_hessians_system(n, m, reach):
    "Its solution times the derivative of the conditions along x gives the potentials' motion, which finite differences confirm."
    p = random_problem(n, m, 2, seed=m); eps, dx = .2, torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = lambda h: solve(**(p | dict(x=p['x'] + h*dx)), eps=eps, reach=reach, tol=1e-14)
    free = lambda s: s.f[:, None] + s.g
    fd = (free(at(1e-5)) - free(at(-1e-5)))/2e-5
    sol = at(0.); s = sol.plan()*2*torch.einsum('ijk,ik->ij', p['x'][:, None] - p['y'], dx)/eps
    df, dg = ImplicitDiff('cholesky', 'identity').solve((-s.sum(1), -s.sum(0)), sol)
    assert (df[:, None] + dg - fd).abs().max() < 1e-6
    for h in ('eps_log', torch.sqrt):
        for how in ('cg', 'lstsq'):
            slope = (lambda r: eps/r) if h == 'eps_log' else lambda r: .5*r.rsqrt()
            u, v = ImplicitDiff(how, h).solve((-s.sum(1), -s.sum(0)), sol)
            P = sol.plan(); u, v = u*slope(P.sum(1)), v*slope(P.sum(0))
            assert (u[:, None] + v - df[:, None] - dg).abs().max() < 1e-8, (h, how)
