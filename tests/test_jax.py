"""JAX against exact answers, against PyTorch and against OTT-JAX: value 1e-10, gradient 1e-9, Hessian 1e-8, in float64."""
import contextlib, os, subprocess, sys, warnings
from pathlib import Path

import numpy as np, pytest, torch

import flash_sinkhorn_hessian as package
from flash_sinkhorn_hessian import ConvergenceWarning, TorchSinkhornHessian
from flash_sinkhorn_hessian.core import random_problem
from quick import xla
from sync import ROOT

DATA = np.load(Path(__file__).with_name('reference.npz'))
VALUE, GRADIENT, HESSIAN = 1e-10, 1e-9, 1e-8
CASES = 'uniform', 'weighted', 'unbalanced'

def rel(got, want): return float(np.linalg.norm(np.asarray(got) - np.asarray(want))/np.linalg.norm(np.asarray(want)))

# Without JAX: one test, which needs none.
HIDE = 'import sys\nfor k in ("jax", "jaxlib", "ott", "lineax"): sys.modules[k] = None\nsys.path.insert(0, %r)\n' % str(ROOT)

def test_without_jax():
    "Everything else works, and asking for the JAX class says what to install."
    code = HIDE + '''
import torch, flash_sinkhorn_hessian as p
assert p.solve(torch.rand(4, 2), torch.rand(5, 2), eps=.1).converged and p.TorchSinkhornHessian()
try: from flash_sinkhorn_hessian import SinkhornHessian
except ImportError as e: assert 'flash_sinkhorn_hessian[jax]' in str(e), e
else: raise AssertionError
try: p.nothing
except AttributeError as e: assert 'nothing' in str(e)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_importing_the_package_leaves_jax_alone():
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import flash_sinkhorn_hessian; assert "jax" not in sys.modules'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

try: import jax
except ImportError: jax = None
needs_jax = pytest.mark.skipif(jax is None, reason='needs JAX')
if jax is not None:
    import jax.numpy as jnp
    jax.config.update('jax_enable_x64', True)
    from flash_sinkhorn_hessian import SinkhornHessian
    from flash_sinkhorn_hessian.jax import reg_ot_cost, reg_ot_divergence
    from flash_sinkhorn_hessian.jax_sinkhorn_hessian import ImplicitDiff, product

def stored(case): return [jnp.asarray(DATA[f'{case}/{k}']) for k in 'xyab']
def reach(case):
    rho = float(DATA[f'{case}/rho_x'])
    return {} if np.isinf(rho) else dict(reach=rho**.5)
def arrays(p, *names): return [jnp.asarray(p[k].numpy()) for k in names or 'xyab']

@pytest.fixture(scope='module')
def everything():
    "Value, gradients and all Hessian blocks of both costs, compiled once for balanced and once for unbalanced."
    made = {}
    def get(tag, case):
        key = tag, case == 'unbalanced'
        if key not in made:
            fn, kw = {'ot': reg_ot_cost, 'div': reg_ot_divergence}[tag], reach(case)
            loss = lambda x, y, a, b, eps: fn(x, y, a, b, eps, tol=1e-13, **kw)
            made[key] = jax.jit(lambda *t: (loss(*t), jax.grad(loss, (0, 1, 2, 3))(*t), jax.hessian(loss, (0, 1, 2, 3))(*t)))
        return made[key](*stored(case), float(DATA[f'{case}/eps']))
    return get

@needs_jax
@pytest.mark.parametrize('tag,case', [('ot', 'uniform'), ('ot', 'weighted'), *(('div', c) for c in CASES), pytest.param('ot', 'unbalanced', marks=pytest.mark.slow)])
def test_against_exact_answers(everything, tag, case):
    value, gradient, hessian = everything(tag, case)
    assert rel(value, DATA[f'{case}/{tag}_value']) <= VALUE
    for g, k in zip(gradient, 'xyab'): assert rel(g, DATA[f'{case}/{tag}_grad_{k}']) <= GRADIENT, k
    for row, u in zip(hessian, 'xyab'):
        for H, v in zip(row, 'xyab'):
            if f'{case}/{tag}_hess_{u}{v}' in DATA: assert rel(H, DATA[f'{case}/{tag}_hess_{u}{v}']) <= HESSIAN, (u, v)

@needs_jax
@pytest.mark.parametrize('n,m', [(9, 21), pytest.param(21, 9, marks=pytest.mark.slow)])
def test_against_pytorch_in_tiles(n, m):
    "Rows cut into tiles, conjugate gradients in place of Cholesky, one weight zero, clouds far from the origin."
    p = random_problem(n, m, 5, seed=n); p['a'][0] = 0; p['a'] /= p['a'].sum(); p['x'] += 30; p['y'] += 29
    sol = package.divergence(**p, eps=.3, tol=1e-13)
    x, y, a, b = arrays(p); v = np.random.default_rng(0).standard_normal((n, 5)); w = np.random.default_rng(1).standard_normal(n)
    loss = lambda x, a: reg_ot_divergence(x, y, a, b, .3, tol=1e-13, batch_size=4)
    run = jax.jit(lambda x, a, v, w: (loss(x, a), *jax.jvp(lambda x, a: jax.grad(loss, (0, 1))(x, a), (x, a), (v, w))))
    value, (gx, ga), (hx, ha) = run(x, a, jnp.asarray(v), jnp.asarray(w))
    v, w = torch.from_numpy(v), torch.from_numpy(w)
    assert rel(value, sol.value) <= VALUE and rel(gx, sol.grad('x')) <= GRADIENT and rel(ga, sol.grad('a')) <= GRADIENT
    assert rel(hx, sol.hvp(v) + sol.hvp(w, ('x', 'a'))) <= HESSIAN and rel(ha, sol.hvp(v, ('a', 'x')) + sol.hvp(w, 'a')) <= HESSIAN

@needs_jax
@pytest.mark.parametrize('n,m', [(15, 17), (17, 15)])
def test_class_in_both_frameworks(n, m):
    p = random_problem(n, m, seed=m); t = list(p.values()); j = arrays(p)
    A = np.random.default_rng(0).standard_normal((n, 3))
    S, T = SinkhornHessian(), TorchSinkhornHessian()
    s, o = S.solve_ott(*j, .1, 1e-13), T.solve_ott(*t, .1, 1e-13)
    for k in ('reg_ot_cost', 'matrix', 'f', 'g', 'a', 'b'): assert rel(getattr(s, k), getattr(o, k)) <= VALUE, k
    assert rel(S.dOTdx(s), T.dOTdx(o)) <= GRADIENT and rel(S.compute_hessian(s), T.compute_hessian(o)) <= 1e-9
    for tau2 in (0., 1e-5, 1e-2): assert rel(S.hessian_vector_product(s, jnp.asarray(A), tau2), T.hessian_vector_product(o, torch.from_numpy(A), tau2)) <= 1e-9
    want = T.compute_hessian(o)
    for name in ('analytical', 'implicit', 'unroll')[:3 if n < m else 1]: assert rel(getattr(S, f'hess_loss_{name}')(*j, .1, 1e-11), want) <= HESSIAN, name

@needs_jax
def test_against_ott_jax():
    pytest.importorskip('ott')
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation, sinkhorn
    x, y, a, b = stored('weighted'); eps = float(DATA['weighted/eps'])
    def theirs(x):
        solver = sinkhorn.Sinkhorn(threshold=1e-13, use_danskin=False, implicit_diff=implicit_differentiation.ImplicitDiff(solver_kwargs=dict(rtol=1e-12, atol=1e-12)))
        return solver(linear_problem.LinearProblem(pointcloud.PointCloud(x, y, epsilon=eps), a, b)).reg_ot_cost
    ours = lambda x: reg_ot_cost(x, y, a, b, eps, tol=1e-13)
    both = [jax.jit(lambda x: (fn(x), jax.grad(fn)(x), jax.hessian(fn)(x)))(x) for fn in (ours, theirs)]
    for got, want, bound in zip(*both, (VALUE, GRADIENT, HESSIAN)): assert rel(got, want) <= bound

@needs_jax
def test_implicit_diff_in_both_frameworks():
    from flash_sinkhorn_hessian.implicit_diff_api import ImplicitDiff as Torch
    for n, m in ((11, 8),):
        p = random_problem(n, m, seed=n); s, o = SinkhornHessian().solve_ott(*arrays(p), .2, 1e-13), package.solve(**p, eps=.2, tol=1e-13)
        gr = [torch.sin(torch.arange(float(k))).double() for k in (n, m)]; gr[1] += (gr[0].sum() - gr[1].sum())/m
        free = lambda u, v, r, c, h: np.add.outer(np.asarray(u)/(1 if h == 'identity' else np.asarray(r)), np.asarray(v)/(1 if h == 'identity' else np.asarray(c)))
        for h in ('identity', 'eps_log'):
            got = free(*jax.jit(lambda gr, s: ImplicitDiff('cg', h).solve(gr, s))(tuple(jnp.asarray(t.numpy()) for t in gr), s), p['a'], p['b'], h)
            assert rel(got, free(*Torch('cholesky', h).solve(gr, o), p['a'], p['b'], h)) <= HESSIAN, (n, h)

@needs_jax
@pytest.mark.slow
def test_third_derivative():
    x, y, a, b = stored('weighted'); eps = float(DATA['weighted/eps']); v = jnp.sin(x)
    second = lambda k: jax.grad(jax.grad(lambda k: reg_ot_cost(x + k*v, y, a, b, eps)))(k)
    run = jax.jit(lambda k: jax.jvp(second, (k,), (1.,)))
    fd = (run(1e-4)[0] - run(-1e-4)[0])/2e-4
    assert abs(run(0.)[1] - fd) <= 1e-5*abs(fd)

@needs_jax
def test_grad_of_grad():
    x, y, a, b = stored('weighted'); eps = float(DATA['weighted/eps']); v = jnp.sin(x)
    h = jax.jit(jax.grad(lambda x: (jax.grad(lambda x: reg_ot_cost(x, y, a, b, eps))(x)*v).sum()))(x)
    assert rel(h, np.einsum('ikjl,jl->ik', DATA['weighted/ot_hess_xx'], v)) < HESSIAN

@needs_jax
@pytest.mark.parametrize('n,m,d,eps', [(30, 20, 3, .1), (300, 300, 3, .005), (90, 120, 16, .1)])
def test_float32(n, m, d, eps):
    "The default tolerance reaches the floor of plain float32: gradient and product to 5e-6."
    p = random_problem(n, m, d, seed=1); q = [t.astype(jnp.float32) for t in arrays(p)]; v = np.random.default_rng(0).standard_normal((n, d)).astype('float32')
    x, y, a, b = (torch.from_numpy(np.array(t)).double() for t in q); sol = package.solve(x, y, a/a.sum(), b/b.sum(), eps=eps)
    run = jax.jit(lambda x, v: (g := jax.value_and_grad(lambda x: reg_ot_cost(x, *q[1:], eps))) and (g(x)[0], *jax.jvp(lambda x: g(x)[1], (x,), (v,))))
    out = run(q[0], jnp.asarray(v))
    assert all(t.dtype == jnp.float32 for t in out)
    for got, want in zip(out, (sol.value, sol.grad(), sol.hvp(torch.from_numpy(v).double()))): assert rel(got, want) < 5e-6

@needs_jax
@pytest.mark.parametrize('kw', [dict(reach_x=.7), dict(reach_x=.7, reach_y=1.3)])
def test_divergence_with_two_penalties(kw):
    p = random_problem(9, 11); x, y, a, b = arrays(p); sol = package.divergence(**p, eps=.1, tol=1e-12, **kw); v = np.sin(np.asarray(x))
    for backend in ('xla', 'dense'):
        loss = lambda x, a: reg_ot_divergence(x, y, a, b, .1, tol=1e-12, backend=backend, **kw)
        (gx, ga), (hx, ha) = jax.jit(lambda x, v: jax.jvp(lambda x: jax.grad(loss, (0, 1))(x, a), (x,), (v,)))(x, jnp.asarray(v))
        assert rel(gx, sol.grad()) < GRADIENT and rel(ga, sol.grad('a')) < GRADIENT
        assert rel(hx, sol.hvp(torch.from_numpy(v))) < HESSIAN and rel(ha, sol.hvp(torch.from_numpy(v), ('a', 'x'))) < HESSIAN

@needs_jax
def test_kernels_of_the_other_framework():
    "The bridge that an NVIDIA GPU takes, with the streaming backend in place of Triton: cost, gradient, product, batches, bad input, float32."
    p = random_problem(12, 9); x, y, a, b = arrays(p); sol = package.solve(**p, eps=.1); v = np.sin(np.asarray(x)); want = sol.hvp(torch.from_numpy(v))
    loss = lambda x: reg_ot_cost(x, y, a, b, .1, backend='streaming')
    for how in (lambda f: f, jax.jit):
        assert rel(how(loss)(x), sol.value) < VALUE and rel(how(jax.grad(loss))(x), sol.grad()) < GRADIENT
        assert rel(how(lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1])(x, jnp.asarray(v)), want) < HESSIAN
    assert rel(jax.vmap(jax.grad(loss))(jnp.stack([x, x]))[1], sol.grad()) < GRADIENT
    g = jax.grad(lambda x: reg_ot_cost(x, *(t.astype(jnp.float32) for t in (y, a, b)), .1, backend='streaming'))(x.astype(jnp.float32))
    assert g.dtype == jnp.float32 and rel(g, sol.grad()) < 5e-6
    with pytest.raises(ValueError, match='batch_size must be None'): reg_ot_cost(x, y, a, b, .1, backend='streaming', batch_size=4)
    with pytest.raises(ValueError, match='backend must be one of'): reg_ot_cost(x, y, a, b, .1, backend='keops')
    with pytest.raises(ValueError, match='a must sum to 1'): reg_ot_cost(x, y, 2*a, b, .1, backend='streaming')
    with pytest.warns(ConvergenceWarning): reg_ot_cost(x, y, a, b, .01, backend='streaming', max_iter=2)

@needs_jax
@pytest.mark.parametrize('n,m,d', [(17, 15, 10), (30, 40, 3)])
def test_small_problems_at_small_eps(n, m, d):
    "Newton along a path of eps: few rounds where alternating updates need thousands; one compilation, a batch of eps too."
    from flash_sinkhorn_hessian.jax_dual import Options, Problem, maximise_dual
    p = random_problem(n, m, d, seed=1); x, y, a, b = arrays(p); x, y = x - x.mean(0), y - y.mean(0)
    eps = jnp.asarray([1., .1, .01, .001])*((x[:, None] - y)**2).sum(-1).mean()
    info = jax.jit(jax.vmap(lambda e: maximise_dual(Options(), Problem(x, y, a, b, e), 1e-10)[2]))(eps)
    assert (info.marginal_error <= 1e-10).all() and (info.n_iter <= 60).all()
    for e, v in zip(eps, info.value): assert rel(v, package.solve(torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y)), p['a'], p['b'], eps=float(e), tol=1e-10).value) <= VALUE

@needs_jax
def test_product_is_compiled_once_and_needs_linear_memory():
    n = 3000
    s = [jax.ShapeDtypeStruct(k, jnp.float64) for k in ((n, 3), (n, 3), (n,), (n,), ())]
    from flash_sinkhorn_hessian.jax_dual import Problem
    lowered = product.lower(Problem(*s), s[2], s[3], s[0], 100, s[4])
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 8*n*n/8
    S = SinkhornHessian(); p = random_problem(9, 7); ot = S.solve_ott(*arrays(p)); S.hessian_vector_product(ot, jnp.ones((9, 3))); before = product._cache_size()
    ot = S.solve_ott(*arrays(random_problem(9, 7, seed=5)), epsilon=.3); S.hessian_vector_product(ot, jnp.zeros((9, 3)), tau2=0.)
    assert product._cache_size() == before

BAD = {'a total': (dict(a=2.), 'a must sum to 1'), 'nan': (dict(x=np.nan), 'x must be finite'), 'eps': (dict(eps=0.), 'eps must be positive'), 'eps string': (dict(eps='1'), 'eps must be a positive number'), 'eps tiny': (dict(eps=1e-300), 'eps=1e-300 is too small for float64'),
       'dimension': (dict(y=None), 'points of the same dimension'), 'weights': (dict(b=None), 'b must have shape')}
@needs_jax
@pytest.mark.parametrize('name', BAD)
def test_the_same_errors_in_both_frameworks(name):
    "One wrong argument, two frameworks, one message."
    p = random_problem(6, 5); (k, v), = BAD[name][0].items()
    if isinstance(v, float) and k in p: p[k] = p[k]*v
    elif v is None: p[k] = p[k][:, :1] if k == 'y' else p[k][:3]
    eps, j = v if k == 'eps' else .1, arrays(p)
    with pytest.raises((TypeError, ValueError), match=BAD[name][1]) as one: package.solve(**p, eps=eps)
    with pytest.raises(type(one.value)) as two: reg_ot_cost(*j, eps)
    assert str(one.value) == str(two.value)
    if k in 'xy':
        with pytest.raises(type(one.value), match=BAD[name][1]): SinkhornHessian().solve_ott(*j, eps)

@needs_jax
def test_wrong_kinds_and_options():
    x, y, a, b = arrays(random_problem(6, 5))
    for bad, words in ((lambda: reg_ot_cost(np.ones((2, 2)), y, a, b, .1), 'x must be a jax.Array'), (lambda: reg_ot_cost(x[None], y, a, b, .1), 'jax.vmap'),
                       (lambda: reg_ot_cost(x, y.astype(int), a, b, .1), 'y must have a floating-point dtype'), (lambda: reg_ot_cost(x, y, a, b, .1, max_iter=0), 'max_iter must be'),
                       (lambda: reg_ot_cost(x, y, a, b, .1, reach=-1.), 'reach must be positive'), (lambda: jax.jit(lambda e: reg_ot_cost(x, y, a, b, e))(jnp.ones(2)), 'eps must be a scalar'),
                       (lambda: SinkhornHessian().compute_hessian(x), 'ot must be a Transport'), (lambda: TorchSinkhornHessian().dOTdx(None), 'ot must be a Transport'),
                       (lambda: SinkhornHessian().solve_ott(x, y, b, b), 'mu must have shape'), (lambda: ImplicitDiff('lu'), 'solver must be')):
        with pytest.raises((TypeError, ValueError), match=words): bad()

@needs_jax
def test_without_x64():
    "JAX's own default: float32 all the way, to float32's accuracy; whoever wants float64 is told the setting."
    code = f"""
import sys, warnings; sys.path.insert(0, {str(ROOT)!r})
import jax, jax.numpy as jnp, numpy as np, flash_sinkhorn_hessian as package
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.jax import reg_ot_divergence
p = random_problem(15, 17); args = [jnp.asarray(p[k].numpy()) for k in 'xyab']; div = package.divergence(**p, eps=.1)
with warnings.catch_warnings():
    warnings.simplefilter('error')
    (value, g), H = jax.jit(lambda x: (lambda f: (jax.value_and_grad(f)(x), jax.hessian(f)(x)))(lambda x: reg_ot_divergence(x, *args[1:], .1)))(args[0])
for got, want in ((value, div.value), (g, div.grad()), (H, div.hessian())):
    assert got.dtype == jnp.float32 and np.linalg.norm(got - want.numpy()) < 1e-5*np.linalg.norm(want), (got, want)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always'); reg_ot_divergence(*args, .1, tol=1e-11).block_until_ready(); jax.effects_barrier()
assert any('marginal_error' in str(w.message) and ('jax_enable_x64' in str(w.message) or jax.default_backend() == 'gpu') for w in said), [*map(str, said)]     # on a GPU it is PyTorch's side that warns
try: package.SinkhornHessian()
except ValueError as e: assert 'jax_enable_x64' in str(e)
else: raise AssertionError
assert package.SinkhornHessian(dtype=jnp.float32).solve_ott(*args, .1, 1e-6).f.dtype == jnp.float32
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k not in xla()})      # compiled as users do
    assert done.returncode == 0, done.stderr

@needs_jax
def test_points_without_weight_are_exact():
    "Their potentials, which are the gradient in their weights, satisfy the update, balanced or not, on either side."
    from flash_sinkhorn_hessian.jax_dual import Options, Problem, densities, maximise_dual
    p = random_problem(9, 7, seed=2); p['a'][0] = 0; p['b'][:2] = 0; p['a'] /= p['a'].sum(); p['b'] /= p['b'].sum()
    q = Problem(*arrays(p), jnp.asarray(.02))
    for o in (Options(), Options(.3, 2.)):
        for o, r in ((o, q), (o.T, q.T)):
            f, g, _ = jax.jit(maximise_dual, static_argnums=0)(o, r, 1e-12); dx, dy = densities(o, r, f, g)
            assert abs(dx*jnp.exp(f/o.rho_x) - 1).max() < 1e-9 and abs(dy*jnp.exp(g/o.rho_y) - 1).max() < 1e-9

@needs_jax
def test_not_converged_is_said():
    x, y, a, b = arrays(random_problem(6, 5))
    with pytest.warns(ConvergenceWarning, match='marginal_error'):
        jax.vmap(lambda e: reg_ot_cost(x, y, a, b, e, max_iter=2))(jnp.asarray([.1, .2])).block_until_ready(); jax.effects_barrier()
    with pytest.warns(ConvergenceWarning, match='threshold'): SinkhornHessian().solve_ott(*arrays(random_problem(37, 53)), .01, 1e-30)   # of a few points the error rounds to zero
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        reg_ot_cost(x, y, None, None, .1).block_until_ready(); jax.effects_barrier()

@needs_jax
@pytest.mark.parametrize('options', [dict(reach_x=31.6), dict(reach_y=31.6), dict(reach=31.6), dict(reach_x=.3, reach_y=100.)])
def test_stiff_penalties_and_unequal_totals(options):
    "The constant between the potentials is thousands of eps."
    q = random_problem(7, 9, 2, dtype=torch.float64); f = jax.jit(lambda x, y, a, b, eps: reg_ot_cost(x, y, a, b, eps, **options))
    for (A, B), eps in (((1, 1.3), .1), ((1, 2), .01), ((17, 23), .1)):
        p = q | dict(a=q['a']*A, b=q['b']*B)
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); want = package.solve(**p, eps=eps, **options).value
        assert rel(f(*arrays(p), eps), want) < 1e-9, (options, A, B, eps)

@needs_jax
def test_weights_at_points_without_weight():
    x, y, a = jnp.array([[0.], [1.], [.5]]), jnp.array([[0.], [1.], [3.]]), jnp.full(3, 1/3); numbers = lambda t: torch.tensor(np.asarray(t)); off = jnp.eye(3) - 1/3
    f = jax.jit(lambda b, eps: (jax.grad(lambda b: reg_ot_cost(x, y, a, b, eps))(b), jax.hessian(lambda b: reg_ot_cost(x, y, a, b, eps))(b)))
    for b, eps in (([0., 1., 0.], .1), ([.5, .5, 0.], .01), ([.5, .5 - 1e-10, 1e-10], .05)):
        g, H = f(jnp.array(b), eps); s = package.solve(*map(numbers, (x, y, a)), torch.tensor(b, dtype=torch.float64), eps=eps)
        assert rel(off @ g, s.grad('b').numpy()) < 1e-9 and rel(off @ H @ off, s.hessian('b').numpy()) < 1e-8 and abs(H - H.T).max() < 1e-10*abs(H).max(), (b, eps)

@needs_jax
def test_value_where_eps_is_above_all_costs():
    "In single precision: the mass of the plan is one but for its rounding, and eps times that must not enter."
    q = random_problem(30, 40, 3, dtype=torch.float32)
    for ours, theirs, kw in ((reg_ot_cost, package.solve, {}), (reg_ot_divergence, package.divergence, {}), (reg_ot_cost, package.solve, dict(reach=.3)), (reg_ot_cost, package.solve, dict(batch_size=7))):
        f = jax.jit(lambda x, y, eps: ours(x, y, None, None, eps, **kw))
        for scale, eps in ((1., 10.), (1e-3, .05), (1., 1e3)):
            x, y = q['x']*scale, q['y']*scale; want = theirs(x.double(), y.double(), eps=eps, **{k: v for k, v in kw.items() if k != 'batch_size'}).value
            assert abs(float(f(*(jnp.asarray(t.numpy()) for t in (x, y)), jnp.float32(eps)))/want - 1) < 5e-6, (ours, kw, scale)

@needs_jax
def test_slope_of_weights_that_do_not_sum_to_one():
    q = random_problem(6, 8, 3); x, y, a, b = arrays(q); u = jnp.cos(jnp.arange(6.)); u -= u.mean()
    f = jax.jit(lambda w: reg_ot_cost(x, y, w, b, .1, tol=1e-13))
    for size in (1., 2.): assert abs(jax.grad(f)(size*a) @ u - (f(size*a + 1e-5*u) - f(size*a - 1e-5*u))/2e-5) < 1e-8

@needs_jax
def test_negative_weights_and_eps_in_compiled_code():
    "Traced, they cannot be refused: by XLA value and derivative are NaN, and a warning says why. PyTorch's side raises."
    x, y, a, b = arrays(random_problem(6, 8, 3)); cost = lambda backend: jax.jit(jax.value_and_grad(lambda a, eps: reg_ot_cost(x, y, a, b, eps, backend=backend), (0, 1)))
    both = cost('xla'); wrong = (a.at[0].set(-.1), .1, 'a must be non-negative'), (a, -.1, 'eps must be'), (a.at[1].set(jnp.nan), .1, 'a must be finite')
    with warnings.catch_warnings(): warnings.simplefilter('error'); value, slope = both(a, .1)
    assert jnp.isfinite(value) and jnp.isfinite(slope[0]).all()
    for *bad, _ in wrong:
        with pytest.warns(ConvergenceWarning, match='negative'): value, slope = jax.block_until_ready(both(*bad)); jax.effects_barrier()
        assert jnp.isnan(value) and jnp.isnan(slope[0]).all() and jnp.isnan(slope[1])
    for *bad, name in wrong:
        with pytest.raises(Exception, match=name): jax.block_until_ready(cost('dense')(*bad))
        with contextlib.suppress(Exception): jax.effects_barrier()            # on a GPU the failed call is reported once more

@needs_jax
def test_static_arguments_say_that_they_are():
    x, y = (jnp.ones((3, 2)), jnp.zeros((4, 2)))
    for kw in (dict(reach=jnp.array(.3)), dict(max_iter=jnp.array(3))):
        with pytest.raises(TypeError, match=f'{next(iter(kw))} is static'): reg_ot_cost(x, y, None, None, .1, **kw)

@needs_jax
def test_marginals_too_light_for_single_precision():
    "A reach so short that some points send e^-90 of their mass."
    g = np.random.default_rng(18); x, y, v = (g.random((n, 3)).astype(np.float32)*s for n, s in ((18, 12.), (20, 12.), (18, 1.)))
    f = lambda x: reg_ot_cost(x, jnp.asarray(y), None, None, .05, reach=1.); h = jax.jvp(jax.grad(f), (jnp.asarray(x),), (jnp.asarray(v),))[1]
    want = package.solve(*map(torch.tensor, (x.astype(float), y.astype(float))), eps=.05, reach=1., backend='dense').hvp(torch.tensor(v.astype(float))); assert rel(h, want) < 2e-2

def in_full_precision(fn, *args):
    from flash_sinkhorn_hessian.jax_dual import products_of
    found = products_of(jax.make_jaxpr(fn)(*args)); return found and all(e.params['precision'] and {t.name for t in e.params['precision']} == {'HIGHEST'} for e in found)

@needs_jax
@pytest.mark.parametrize('loss,options,d', [('cost', dict(), 20), ('cost', dict(reach=.7), 3), ('divergence', dict(reach_x=.7), 20), ('divergence', dict(batch_size=4), 20)], ids=str)     # costs from a product, and from differences
def test_every_matrix_product_is_in_full_precision(loss, options, d):
    "On a GPU JAX's default for float32 is TF32, three digits: in value, gradient and second derivatives, forward or reverse, no product is left to it."
    loss = {'cost': reg_ot_cost, 'divergence': reg_ot_divergence}[loss]; t = [w.astype(jnp.float32) for w in arrays(random_problem(9, 8, d))]
    both = jax.value_and_grad(lambda *t: loss(*t, .1, backend='xla', **options), (0, 1, 2, 3))
    assert in_full_precision(lambda *t: jax.jvp(both, t, t), *t) and in_full_precision(jax.grad(lambda x: both(x, *t[1:])[1][0].sum()), t[0])

@needs_jax
def test_every_matrix_product_of_the_class_is_in_full_precision():
    from flash_sinkhorn_hessian.jax_sinkhorn_hessian import closed_hessian, count_iterations, transport, _gradient, _implicit, _unroll
    for n, m in ((9, 8), (8, 9)):
        t = [*(w.astype(jnp.float32) for w in arrays(random_problem(n, m, 20))), jnp.float32(.5), jnp.float32(1e-4)]
        ot = transport(*t); p, (f, g) = ot.problem, ot.potentials
        assert in_full_precision(lambda: closed_hessian(p, f, g, 1e-6)) and in_full_precision(lambda: product(p, f, g, t[0], 9, jnp.float32(0)))
    for fn in (lambda: transport(*t), lambda: _gradient(p, f, g), lambda: _implicit(p, t[5]), lambda: _unroll(*t[:2], t[4], *t[2:4], 3), lambda: count_iterations(p, t[5], 9), lambda: ot.matrix, lambda: ImplicitDiff('cg').solve((f, g), ot), lambda: ImplicitDiff('cholesky').solve((f, g), ot)): assert in_full_precision(fn)
