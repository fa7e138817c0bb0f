"""Every derivative against answers computed with sixty digits (reference.npz), in float64, on every way to run them."""
import itertools
from pathlib import Path

import numpy as np, pytest, torch

from flash_sinkhorn_hessian import divergence, solve, streaming

DATA = np.load(Path(__file__).with_name('reference.npz'))
CASES = 'uniform', 'weighted', 'unbalanced'
BLOCKS = 'xx', 'xy', 'yy', 'aa', 'ab', 'bb', 'xa', 'xb'
NAMES = 'xyab'
WAYS = 'dense', 'compiled', 'plain'
VALUE, GRADIENT, HESSIAN = 1e-10, 1e-9, 1e-8

pytestmark = pytest.mark.usefixtures('one_thread')

def stored(case, key): return torch.from_numpy(np.array(DATA[f'{case}/{key}']))

def rel(got, want):
    "Relative error in the norm of the answer"
    assert got.shape == want.shape and got.dtype == torch.float64
    return ((got - want).norm() / want.norm()).item()

def block(case, tag, u, v):
    "The stored Hessian block of (u, v), shaped (*u, *v); blocks on the other side of the diagonal are transposes."
    if f'{case}/{tag}_hess_{u}{v}' in DATA: return stored(case, f'{tag}_hess_{u}{v}')
    if f'{case}/{tag}_hess_{v}{u}' in DATA:
        t, k = stored(case, f'{tag}_hess_{v}{u}'), 2 if v in 'xy' else 1
        return t.permute(*range(k, t.ndim), *range(k))
    return None                                                      # (y, a) and (y, b) are not stored

def centred(t, dim): return t - t.mean(dim, keepdim=True)

@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    "Dense, streaming with the compiled kernels, streaming on plain tiles"
    if request.param == 'plain': monkeypatch.setattr(streaming, 'compiled_kernel', lambda d, dtype: None)
    if request.param == 'compiled' and streaming.compiled_kernel(3, torch.float64) is None: pytest.skip('no C compiler')
    return request.param

def solution(case, tag, way, half=False, **kw):
    "The solved problem; as a half cost, everything is halved: eps, penalties and (so say the tests) the answers."
    p = {k: stored(case, k) for k in 'xyab'}
    eps, rho_x, rho_y = (float(DATA[f'{case}/{k}']) for k in ('eps', 'rho_x', 'rho_y'))
    s = .5 if half else 1.
    reach = {k: None if np.isinf(r) else (s*r)**.5 for k, r in (('reach_x', rho_x), ('reach_y', rho_y))}
    options = dict(eps=s*eps, half_cost=half, tol=1e-13, backend='dense' if way == 'dense' else 'streaming') | reach | kw
    sol = {'ot': solve, 'div': divergence}[tag](**p, **options)
    assert sol.converged and sol.backend == options['backend']
    return sol

cases = pytest.mark.parametrize('case', CASES)
tags = pytest.mark.parametrize('tag', ['ot', 'div'])

@cases
@tags
@pytest.mark.filterwarnings('error::UserWarning', 'error::RuntimeWarning')
def test_value_and_gradients(case, tag, way):
    sol = solution(case, tag, way)
    assert rel(sol.value, stored(case, f'{tag}_value')) <= VALUE
    for u in NAMES: assert rel(sol.grad(u), stored(case, f'{tag}_grad_{u}')) <= GRADIENT, u

@cases
def test_potentials_and_plan(case, way):
    sol = solution(case, 'ot', way)
    P = stored(case, 'P')
    assert rel(sol.f, stored(case, 'f')) <= GRADIENT and rel(sol.g, stored(case, 'g')) <= GRADIENT
    assert rel(sol.plan(), P) <= GRADIENT
    V, U = torch.randn(17, 4, dtype=torch.float64), torch.randn(15, 2, dtype=torch.float64)
    assert rel(sol.apply(V), P @ V) <= GRADIENT and rel(sol.apply_t(U), P.T @ U) <= GRADIENT
    assert rel(sol.apply(V[:, 0]), P @ V[:, 0]) <= GRADIENT and rel(sol.apply_t(U[:, 0]), P.T @ U[:, 0]) <= GRADIENT

@cases
@tags
def test_hessian_blocks(case, tag, way):
    sol = solution(case, tag, way)
    for u, v in itertools.product(NAMES, NAMES):
        H, want = sol.hessian((u, v)), block(case, tag, u, v)
        if want is None: want = block(case, tag, v, u)
        if want is not None: assert rel(H, want) <= HESSIAN, (u, v)
        k = 2 if u in 'xy' else 1
        back = sol.hessian((v, u))
        assert rel(back, H.permute(*range(k, H.ndim), *range(k))) <= HESSIAN, (u, v)
    for u in NAMES: assert rel(sol.hessian(u), block(case, tag, u, u)) <= HESSIAN, u

@cases
@tags
@pytest.mark.parametrize('solver', ['auto', 'cg'])
def test_hvp_blocks_one_direction_and_stacks(case, tag, way, solver):
    sol, hard = solution(case, tag, way), case != 'unbalanced'
    gen = torch.Generator().manual_seed(1)
    for u, v in itertools.product(NAMES, NAMES):
        H = block(case, tag, u, v)
        if H is None: H = sol.hessian((u, v))                        # held to its stored relatives above
        shape = stored(case, v).shape
        V = torch.randn(3, *shape, generator=gen, dtype=torch.float64)
        W = centred(V, -1) if hard and v in 'ab' else V
        want = torch.tensordot(W, H, (list(range(1, 1 + len(shape))), list(range(H.ndim - len(shape), H.ndim))))
        got = sol.hvp(V, (u, v), solver=solver)
        assert rel(got, want) <= HESSIAN, (u, v)
        assert rel(sol.hvp(V[1], (u, v), solver=solver), want[1]) <= HESSIAN, (u, v)
        if u == v: assert rel(sol.hvp(V[2], u, solver=solver), want[2]) <= HESSIAN, u
        assert sol.cg_info.converged

@cases
@tags
def test_half_cost_scales(case, tag, way):
    "Half of the cost, at half the eps and half the penalty, is half of everything; the plan is the same."
    sol = solution(case, tag, way, half=True)
    assert rel(2*sol.value, stored(case, f'{tag}_value')) <= VALUE
    for u in NAMES: assert rel(2*sol.grad(u), stored(case, f'{tag}_grad_{u}')) <= GRADIENT, u
    for uv in BLOCKS: assert rel(2*sol.hessian(tuple(uv)), stored(case, f'{tag}_hess_{uv}')) <= HESSIAN, uv
    v = torch.randn(15, 3, dtype=torch.float64)
    assert rel(2*sol.hvp(v), torch.einsum('ikjl,jl->ik', stored(case, f'{tag}_hess_xx'), v)) <= HESSIAN
    if tag == 'ot': assert rel(sol.plan(), stored(case, 'P')) <= GRADIENT

@cases
@tags
def test_permuting_the_points_permutes_the_answers(case, tag, way):
    p = {k: stored(case, k) for k in 'xyab'}
    i, j = torch.randperm(15), torch.randperm(17)
    sol = solution(case, tag, way)
    reach = {k: None if np.isinf(r := float(DATA[f'{case}/{q}'])) else r**.5 for k, q in (('reach_x', 'rho_x'), ('reach_y', 'rho_y'))}
    moved = {'ot': solve, 'div': divergence}[tag](p['x'][i], p['y'][j], p['a'][i], p['b'][j], eps=float(DATA[f'{case}/eps']), tol=1e-13, backend=sol.backend, **reach)
    assert rel(moved.value, sol.value) <= VALUE
    for u, k in zip(NAMES, (i, j, i, j)): assert rel(moved.grad(u), sol.grad(u)[k]) <= GRADIENT
    assert rel(moved.hessian('x'), sol.hessian('x')[i][:, :, i]) <= HESSIAN

@cases
def test_exchanging_the_clouds_exchanges_the_answers(case, way):
    p = {k: stored(case, k) for k in 'xyab'}
    reach = {k: None if np.isinf(r := float(DATA[f'{case}/{q}'])) else r**.5 for k, q in (('reach_y', 'rho_x'), ('reach_x', 'rho_y'))}
    sol = solution(case, 'ot', way)
    back = solve(p['y'], p['x'], p['b'], p['a'], eps=float(DATA[f'{case}/eps']), tol=1e-13, backend=sol.backend, **reach)
    assert rel(back.value, sol.value) <= VALUE
    for u, v in zip('xyab', 'yxba'): assert rel(back.grad(u), sol.grad(v)) <= GRADIENT
    for u, v in (('x', 'y'), ('a', 'b')): assert rel(back.hessian(u), sol.hessian(v)) <= HESSIAN
    assert rel(back.hessian(('x', 'b')), sol.hessian(('y', 'a'))) <= HESSIAN

@cases
@tags
def test_default_tolerance_is_enough(case, tag, way):
    "What a user gets without asking for anything stays close to these bounds."
    sol = solution(case, tag, way, tol=None)
    assert rel(sol.value, stored(case, f'{tag}_value')) <= VALUE
    for u in NAMES: assert rel(sol.grad(u), stored(case, f'{tag}_grad_{u}')) <= GRADIENT, u
    for uv in BLOCKS: assert rel(sol.hessian(tuple(uv)), stored(case, f'{tag}_hess_{uv}')) <= HESSIAN, uv
