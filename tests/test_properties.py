"""What must hold for any problem: identities, symmetries, finite differences and agreement of the backends, on fresh random data."""
import itertools, math, warnings

import hypothesis, pytest, torch
from hypothesis import strategies as st

from flash_sinkhorn_hessian import divergence, solve

SEED = 0
BACKENDS = 'dense', 'streaming'
D64, D32 = torch.float64, torch.float32
hypothesis.settings.register_profile('here', max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile('here')

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The problems are small: waking a second thread costs more than it does."
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

def gen(seed): return torch.Generator().manual_seed(seed)
def rand(*s, seed=0): return torch.rand(*s, generator=gen(seed), dtype=D64)
def randn(*s, seed=0): return torch.randn(*s, generator=gen(seed), dtype=D64)
def weights(n, seed=0, kind='uneven'):
    w = {'uniform': torch.ones(n, dtype=D64), 'uneven': rand(n, seed=seed) + .1, 'wide': 10**(-12*rand(n, seed=seed)),
         'zeros': (rand(n, seed=seed) + .1) * (torch.arange(n) % 3 != 1)}[kind]
    return w / w.sum()

def problem(n=13, m=11, d=3, seed=0, kind='uneven'):
    return dict(x=rand(n, d, seed=seed), y=rand(m, d, seed=seed + 1) + .1, a=weights(n, seed + 2, kind), b=weights(m, seed + 3, kind))

def mean_cost(x, y): return torch.cdist(x, y).square().mean().item() or 1.
def err(got, want, floor=0.): return ((got.double() - want.double()).abs().max() / max(want.abs().max().item(), floor, 1e-300)).item()

def identities(sol, x, y, a, b, tol, half=False):
    "Everything that holds exactly for a converged balanced problem, to `tol` relative to the size of the terms."
    c = 1. if half else 2.
    n, m = len(x), len(y); s = .5*c
    assert sol.converged
    for t in (sol.value, sol.f, sol.g, *(sol.grad(u) for u in 'xyab')): assert torch.isfinite(t).all()
    one_x, one_y = torch.ones_like(x), torch.ones_like(y)
    big = a.max().item() * c
    assert err(sol.apply(torch.ones_like(b)), a, a.max().item()) < tol and err(sol.apply_t(torch.ones_like(a)), b, b.max().item()) < tol
    h = sol.hvp(one_x)                                                # sum_j Hess_xx[i, :, j, :] = 2 a_i I
    assert err(h, c*a[:, None]*one_x) < tol
    assert (sol.hvp(one_x) + sol.hvp(one_y, ('x', 'y'))).abs().max() < tol*big      # translations of x and y together
    assert (sol.hvp(one_x, ('y', 'x')) + sol.hvp(one_y, 'y')).abs().max() < tol*c*b.max().item()
    total = (sol.grad('x').sum(0) + sol.grad('y').sum(0)).abs().max()
    assert total < tol*max(sol.grad('x').abs().sum().item(), sol.grad('y').abs().sum().item(), 1e-300)
    assert abs(sol.grad('a').mean().item()) <= tol*max(1., sol.grad('a').abs().max().item())
    p, q = randn(*x.shape, seed=5).to(x.dtype), randn(*x.shape, seed=6).to(x.dtype)
    hp, hq = sol.hvp(torch.stack([p, q]))
    size = (hp.norm()*q.norm() + hq.norm()*p.norm()).item()
    assert abs(((q*hp).sum() - (p*hq).sum()).item()) < tol*max(size, 1e-300)         # symmetry
    r = randn(*y.shape, seed=7).to(x.dtype)
    k1, k2 = sol.hvp(r, ('x', 'y')), sol.hvp(p, ('y', 'x'))
    assert abs(((p*k1).sum() - (r*k2).sum()).item()) < tol*max((k1.norm()*p.norm() + k2.norm()*r.norm()).item(), 1e-300)

SHAPES = [(1, 1, 1), (1, 1, 3), (1, 7, 2), (7, 1, 2), (2, 2, 1), (5, 9, 1), (9, 5, 1), (17, 16, 3), (16, 33, 16), (12, 9, 17), (8, 8, 64), (9, 7, 200), (40, 3, 2)]

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('n,m,d', SHAPES)
@pytest.mark.parametrize('half', [False, True])
def test_shapes(n, m, d, backend, half):
    p = problem(n, m, d); eps = .1*mean_cost(p['x'], p['y'])
    identities(solve(**p, eps=eps, backend=backend, half_cost=half, tol=1e-12), **p, tol=1e-8, half=half)

@hypothesis.given(n=st.integers(1, 14), m=st.integers(1, 14), d=st.integers(1, 5), seed=st.integers(0, 10**6), kind=st.sampled_from(['uniform', 'uneven', 'wide', 'zeros']),
                  eps=st.floats(-1.7, 1.), scale=st.sampled_from([1e-3, 1., 1e3]), shift=st.sampled_from([0., 1e3]), backend=st.sampled_from(BACKENDS))
def test_random_balanced_problems(n, m, d, seed, kind, eps, scale, shift, backend):
    p = problem(n, m, d, seed, kind)
    p['x'], p['y'] = scale*p['x'] + shift*scale, scale*p['y'] + shift*scale
    eps = 10**eps * mean_cost(p['x'], p['y'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sol = solve(**p, eps=eps, backend=backend)
    identities(sol, **p, tol=1e-5)

@pytest.mark.parametrize('dtype,tol', [(D64, 1e-8), (D32, 2e-4)])
@pytest.mark.parametrize('eps', [1e-3, 1e-2, .1, 1., 10.])
@pytest.mark.parametrize('backend', BACKENDS)
def test_eps_from_tiny_to_large(eps, backend, dtype, tol):
    p = problem(20, 24, 2, seed=3); eps = eps*mean_cost(p['x'], p['y'])
    p = {k: v.to(dtype) for k, v in p.items()}
    with warnings.catch_warnings():
        warnings.simplefilter('error' if eps > 5e-3 else 'ignore')
        sol = solve(**p, eps=eps, backend=backend)
        if dtype == D32 and eps < 5e-3 and not sol.converged: return      # beyond float32, and said so
        assert sol.converged
        identities(sol, **p, tol=tol if eps > 5e-3 else 100*tol)

REACH = {'hard': {}, 'short': dict(reach=.1), 'one': dict(reach=1.), 'long': dict(reach=10.), 'semi x': dict(reach_x=.5), 'semi y': dict(reach_y=.5), 'uneven': dict(reach_x=.3, reach_y=2.)}
reaches = pytest.mark.parametrize('reach', REACH)
both = pytest.mark.parametrize('front', [solve, divergence])

def shifted(p, u, v, t): return p | {u: p[u] + t*v}

@both
@reaches
@pytest.mark.parametrize('total', [1., 3.])
@pytest.mark.parametrize('half', [False, True])
def test_finite_differences(front, reach, total, half):
    "Central differences of the value give the gradient, and those of the gradient give every product."
    if reach == 'hard' and total != 1: return
    hard = reach == 'hard'
    p = problem(5, 6, 2, seed=1); p['a'] = p['a']*total
    if reach in ('semi x', 'semi y'): p['a'] = p['a']/total
    go = lambda q: front(**q, eps=.1, tol=1e-13, half_cost=half, backend='dense', **REACH[reach])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sol, h = go(p), 1e-4
        for w in 'xyab':
            v = randn(*p[w].shape, seed=ord(w)) * (1. if w in 'xy' else .05)
            if w in 'ab' and (hard or reach.startswith('semi')): v = v - v.mean()
            s = [go(shifted(p, w, v, k*h)) for k in (-2, -1, 1, 2)]
            diff = lambda f: (f(s[0]) - 8*f(s[1]) + 8*f(s[2]) - f(s[3])) / (12*h)
            assert abs(diff(lambda o: o.value) - (sol.grad(w)*v).sum()) < 1e-8*max(1., (sol.grad(w)*v).abs().sum().item())
            for u in 'xyab':
                want = diff(lambda o: o.grad(u))
                assert err(sol.hvp(v, (u, w)), want, 1e-3) < 2e-6, (u, w)
                assert err(torch.tensordot(sol.hessian((u, w)), v, v.ndim), want, 1e-3) < 2e-6, (u, w)

@both
@reaches
@pytest.mark.parametrize('kind', ['uneven', 'zeros', 'wide'])
def test_backends_agree(front, reach, kind):
    p = problem(14, 9, 3, seed=2, kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a, b = (front(**p, eps=.05, backend=o, tol=1e-12, **REACH[reach]) for o in BACKENDS)
        assert a.converged and b.converged and err(b.value, a.value) < 1e-9
        for u in 'xyab': assert err(b.grad(u), a.grad(u), 1e-6) < 1e-7, u
        for u, w in itertools.product('xyab', 'xyab'):
            v = randn(*p[w].shape, seed=1)
            assert err(b.hvp(v, (u, w)), a.hvp(v, (u, w)), 1e-6) < 1e-6, (u, w)
            assert err(a.hvp(v, (u, w)), torch.tensordot(a.hessian((u, w)), v - v.mean() if w in 'ab' and reach == 'hard' else v, v.ndim), 1e-6) < 1e-6, (u, w)

@both
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('reach', ['hard', 'one', 'semi x'])
def test_products_are_linear_and_stacks_are_one_by_one(front, backend, reach):
    p = problem(12, 10, 3, seed=4); sol = front(**p, eps=.05, backend=backend, **REACH[reach])
    for u, w in (('x', 'x'), ('x', 'y'), ('a', 'a'), ('x', 'b'), ('b', 'y')):
        V = randn(4, *p[w].shape, seed=3)
        H = sol.hvp(V, (u, w))
        assert H.shape == (4, *p[u].shape)
        for k in range(4): assert err(sol.hvp(V[k], (u, w)), H[k], 1e-9) < 1e-7
        assert err(sol.hvp(2*V[0] - 3*V[1], (u, w)), 2*H[0] - 3*H[1], 1e-9) < 1e-7
        for c in (1e-30, 1e-6, 1e6): assert err(sol.hvp(c*V[0], (u, w))/c, H[0], 1e-9) < 1e-7, c
        assert sol.hvp(0*V[0], (u, w)).abs().max() == 0
        mixed = sol.hvp(torch.stack([V[0], 1e-20*V[1], 0*V[2]]), (u, w))    # a small direction beside a large one
        assert err(mixed[1]*1e20, H[1], 1e-9) < 1e-7 and mixed[2].abs().max() == 0

@pytest.mark.parametrize('backend', BACKENDS)
def test_float32_products_are_scale_invariant(backend):
    p = {k: v.float() for k, v in problem(30, 25, 3).items()}
    sol = solve(**p, eps=.05, backend=backend); v = randn(30, 3).float(); h = sol.hvp(v)
    for c in (1e-30, 1e-6, 1e6): assert err(sol.hvp(c*v)/c, h) < 2e-5, c

@both
@reaches
def test_blocks_are_symmetric_and_transposed(front, reach):
    sol = front(**problem(7, 6, 2), eps=.1, tol=1e-12, backend='dense', **REACH[reach])
    for u, w in itertools.combinations_with_replacement('xyab', 2):
        A, B = sol.hessian((u, w)), sol.hessian((w, u)); k = 2 if u in 'xy' else 1
        assert err(A.permute(*range(k, A.ndim), *range(k)), B, 1e-9) < 1e-8, (u, w)

@both
@pytest.mark.parametrize('backend', BACKENDS)
def test_hessian_operator_in_scipy(front, backend):
    from scipy.sparse.linalg import cg, eigsh, minres
    p = problem(9, 8, 2); sol = front(**p, eps=.3, backend=backend, tol=1e-12)
    A, H = sol.hessian_operator('x'), sol.hessian('x').reshape(18, 18)
    w = torch.linalg.eigvalsh(H)
    assert A.shape == (18, 18) and abs(eigsh(A, k=1, which='LA', return_eigenvectors=False)[0] - w[-1].item()) < 1e-8
    v = randn(18, seed=2).numpy(); r = A @ v
    if w[0] > 1e-6: assert abs(H.numpy() @ cg(A, r, rtol=1e-12)[0] - r).max() < 1e-7
    assert abs(H.numpy() @ minres(A, r, rtol=1e-12)[0] - r).max() < 1e-6
    K = sol.hessian_operator(('x', 'y'))
    assert K.shape == (18, 16) and abs(K.rmatvec(v) - sol.hessian(('x', 'y')).reshape(18, 16).numpy().T @ v).max() < 1e-9
    assert abs(K.matmat(randn(16, 3).numpy()) - sol.hessian(('x', 'y')).reshape(18, 16).numpy() @ randn(16, 3).numpy()).max() < 1e-9
    assert abs(sol.hessian_operator(('a', 'x')).matvec(v) - sol.hessian(('a', 'x')).reshape(9, 18).numpy() @ v).max() < 1e-8

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype,tol', [(D64, 1e-9), (D32, 1e-5)])
@reaches
def test_divergence_vanishes_and_is_positive(reach, backend, dtype, tol):
    p = {k: v.to(dtype) for k, v in problem(15, 12, 2, seed=8).items()}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        s = divergence(p['x'], p['x'], p['a'], p['a'], eps=.05, backend=backend, **REACH[reach])
        if 'reach_x' not in REACH[reach] and 'reach_y' not in REACH[reach]:
            assert abs(s.value) < tol and s.grad('x').abs().max() < tol and s.grad('a').abs().max() < 10*tol
            assert divergence(**p, eps=.05, backend=backend, **REACH[reach]).value > 0
            x = p['x'].flip(0); t = divergence(p['x'], x, p['a'], p['a'].flip(0), eps=.05, backend=backend, **REACH[reach])
            assert abs(t.value) < tol

@pytest.mark.parametrize('backend', BACKENDS)
@both
def test_batches_are_one_by_one(front, backend):
    for reach in ({}, dict(reach=1.), dict(reach_x=.5)):
        ps = [problem(8, 6, 2, seed=10*k) for k in range(3)]
        q = {k: torch.stack([p[k] for p in ps]) for k in 'xyab'}
        sol, one = front(**q, eps=.1, backend=backend, tol=1e-12, **reach), [front(**p, eps=.1, backend=backend, tol=1e-12, **reach) for p in ps]
        stack = lambda f: torch.stack([f(s) for s in one])
        assert sol.value.shape == (3,) and err(sol.value, stack(lambda s: s.value)) < 1e-9
        for u in 'xyab': assert err(sol.grad(u), stack(lambda s: s.grad(u))) < 1e-8
        v = randn(3, 8, 2); V = randn(4, 3, 8, 2)
        assert err(sol.hvp(v), torch.stack([s.hvp(t) for s, t in zip(one, v)])) < 1e-7
        assert err(sol.hvp(V), torch.stack([s.hvp(V[:, k]) for k, s in enumerate(one)], 1)) < 1e-7
        assert err(sol.hvp(v, ('b', 'x')), torch.stack([s.hvp(t, ('b', 'x')) for s, t in zip(one, v)])) < 1e-7
        for uv in ('x', ('x', 'y'), ('a', 'b'), ('y', 'a')): assert err(sol.hessian(uv), stack(lambda s: s.hessian(uv))) < 1e-7

@both
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [D32, D64])
def test_moving_both_clouds_changes_nothing(front, backend, dtype):
    p = {k: v.to(dtype) for k, v in problem(12, 10, 3).items()}
    p['x'], p['y'] = ((v*1024).round()/1024 for v in (p['x'], p['y']))       # so that moving them rounds nothing
    sol = front(**p, eps=.05, backend=backend); v = randn(12, 3).to(dtype)
    for t in (1024., 4096.) + ((2.**20,) if dtype == D64 else ()):
        far = front(**p | dict(x=p['x'] + t, y=p['y'] + t), eps=.05, backend=backend)
        k = 1e-5 if dtype == D32 else 1e-8
        assert err(far.value, sol.value, .1) < k and err(far.grad('x'), sol.grad('x')) < k and err(far.hvp(v), sol.hvp(v)) < k

@pytest.mark.parametrize('backend', BACKENDS)
def test_moving_one_cloud_far_away(backend):
    "Balanced, OT(x + t, y) = OT(x, y) + 2 <t, mean x - mean y> + |t|^2; the plan and the Hessian stay."
    p = problem(12, 10, 3); sol = solve(**p, eps=.05, backend=backend); t = torch.tensor([1e3, -500., 0.], dtype=D64); v = randn(12, 3)
    far = solve(**p | dict(x=p['x'] + t), eps=.05, backend=backend)
    want = sol.value + 2*(t*(p['a'] @ p['x'] - p['b'] @ p['y'])).sum() + t.square().sum()
    assert err(far.value, want) < 1e-13 and err(far.grad('x'), sol.grad('x') + 2*p['a'][:, None]*t) < 1e-12 and err(far.hvp(v), sol.hvp(v)) < 1e-7 and err(far.plan(), sol.plan()) < 1e-7

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('c', [1e-3, 1e3])
@pytest.mark.parametrize('reach', [None, .5])
def test_scaling_the_clouds(backend, c, reach):
    p = problem(12, 10, 3); v = randn(12, 3); go = lambda q, c: solve(**q, eps=.05*c*c, reach=reach and reach*c, backend=backend)
    a, b = go(p, 1.), go(p | dict(x=c*p['x'], y=c*p['y']), c)
    assert err(b.value, c*c*a.value) < 1e-9 and err(b.grad('x'), c*a.grad('x')) < 1e-8 and err(b.hvp(v), a.hvp(v)) < 1e-7

DEGENERATE = {
    'one point each, far': (torch.zeros(1, 2), torch.full((1, 2), 1e3), 1e-3),
    'two far pairs': (torch.tensor([[0., 0], [1e3, 0]]), torch.tensor([[1e3, .5], [.3, 0]]), 1e-3),
    'two clusters': (torch.cat([rand(6, 2), rand(6, 2) + 50]), torch.cat([rand(5, 2, seed=1) + 50, rand(5, 2, seed=2)]), .05),
    'all points one': (torch.ones(7, 3), torch.ones(5, 3), .1),
    'x one point repeated': (torch.ones(7, 3), rand(5, 3), .01),
    'x = y': (rand(12, 2), rand(12, 2), 1e-3),
    'x = y permuted': (rand(12, 2), rand(12, 2).flip(0), 1e-2),
    'duplicates': (rand(4, 2).repeat(3, 1), rand(5, 2, seed=1).repeat(2, 1), .01),
    'a grid': (torch.arange(16.)[:, None]/16, torch.arange(16.)[:, None]/16, 1e-3),
    'one outlier': (torch.cat([rand(9, 2), torch.full((1, 2), 30.)]), rand(8, 2, seed=1), .1),
}

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', DEGENERATE)
def test_degenerate_clouds(name, backend):
    x, y, eps = DEGENERATE[name]; x, y = x.double(), y.double()
    a, b = weights(len(x), kind='uniform'), weights(len(y), kind='uniform')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if 'clusters' in name: b = a[:10]*1.2
        identities(solve(x, y, a, b, eps=eps, backend=backend), x, y, a, b, tol=1e-6)

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('far', [1., 2., 2.65, 3., 10., 30., 1e3])
@pytest.mark.parametrize('reach', [dict(reach=.1), dict(reach_x=.1)])
def test_points_beyond_the_reach(far, backend, reach):
    "A point that may lose its mass, and does: it pays its penalty and moves nothing."
    x, y = rand(8, 2), rand(9, 2, seed=1); x[0] += far; v = randn(8, 2)
    sol = solve(x, y, eps=.01, backend=backend, **reach)
    ref = solve(torch.cat([x[:1]*0 + 7., x[1:]]), y, eps=.01, backend='dense', **reach)
    assert sol.converged
    for t in (sol.grad('x'), sol.grad('y'), sol.grad('a'), sol.hvp(v), sol.hvp(v[:, 0], 'a'), sol.hvp(v[:, 0], ('x', 'a'))): assert torch.isfinite(t).all()
    if far >= 2: assert err(sol.value, ref.value) < 1e-9 and sol.grad('x')[0].abs().max() < 1e-12 and err(sol.hvp(v)[1:], ref.hvp(v)[1:]) < max(1e-7, 100*sol.tol)

@pytest.mark.parametrize('reach', [30., 1e3, 1e5])
@pytest.mark.parametrize('backend', BACKENDS)
def test_a_long_reach_tends_to_a_hard_marginal(reach, backend):
    p = problem(20, 15, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        soft, hard = (solve(**p, eps=.01, backend=backend, **o) for o in (dict(reach=reach), {}))
    assert soft.converged and err(soft.value, hard.value) < 2/reach**2

@pytest.mark.parametrize('kind', ['zeros', 'wide'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_points_without_weight_change_nothing(kind, backend):
    p = problem(12, 9, 2, kind='zeros'); i, j = p['a'] > 0, p['b'] > 0; v = randn(12, 2)
    q = dict(x=p['x'][i], y=p['y'][j], a=p['a'][i], b=p['b'][j])
    for front, reach in itertools.product((solve, divergence), ({}, dict(reach=1.))):
        s, t = front(**p, eps=.05, tol=1e-12, backend=backend, **reach), front(**q, eps=.05, tol=1e-12, backend='dense', **reach)
        assert err(s.value, t.value) < 1e-10 and err(s.grad('x')[i], t.grad('x')) < 1e-9 and err(s.hvp(v)[i], t.hvp(v[i])) < 1e-8
        assert s.grad('x')[~i].abs().max() == 0 and torch.isfinite(s.f).all() and torch.isfinite(s.grad('a')).all()

@pytest.mark.parametrize('reach', [None, .7])
def test_self_term_has_the_product_of_its_own_hessian(reach):
    "A self term is a problem like any other: moving one of its sides alone is not the symmetric shortcut."
    from flash_sinkhorn_hessian.core import random_problem
    t = random_problem(9, 7)
    own = divergence(*t.values(), eps=.1, reach=reach).xx
    v = torch.randn(9, 3, dtype=torch.float64)
    assert torch.allclose(own.hvp(v, solver='cg'), torch.einsum('ikjl,jl->ik', own.hessian(), v), atol=1e-9)
