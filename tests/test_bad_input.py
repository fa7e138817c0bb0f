"""Every bad argument is refused with a message that says which one, what it was and what it must be."""
import warnings

import numpy as np, pytest, torch

from flash_sinkhorn_hessian import ConvergenceWarning, SamplesLoss, divergence, ot_cost, solve

N, M, D = 6, 5, 2
def problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    u = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
    x, y, a, b = u(N, D), u(M, D), u(N) + .1, u(M) + .1
    return {k: v.to(dtype) for k, v in dict(x=x, y=y, a=a/a.sum(), b=b/b.sum()).items()}

def put(t, value, *where):
    t = t.clone(); t[where] = value
    return t

P = problem()
nan, inf = float('nan'), float('inf')

# what changes, the error, and words that the message must hold
BAD = {
    'numpy x': (dict(x=P['x'].numpy()), TypeError, 'x must be a torch.Tensor', 'ndarray'),
    'list y': (dict(y=P['y'].tolist()), TypeError, 'y must be a torch.Tensor', 'list'),
    'None x': (dict(x=None), TypeError, 'x must be a torch.Tensor', 'None'),
    'list a': (dict(a=[1/N]*N), TypeError, 'a must be a torch.Tensor', 'list'),
    'numpy b': (dict(b=P['b'].numpy()), TypeError, 'b must be a torch.Tensor', 'ndarray'),
    'integer x': (dict(x=torch.ones(N, D, dtype=torch.int64)), TypeError, 'x must', 'int64'),
    'integer y': (dict(y=torch.ones(M, D, dtype=torch.int32)), TypeError, 'y must', 'int32'),
    'bool x': (dict(x=torch.ones(N, D, dtype=torch.bool)), TypeError, 'x must', 'bool'),
    'complex x': (dict(x=P['x'].to(torch.complex128)), TypeError, 'x must', 'complex128'),
    'integer a': (dict(a=torch.ones(N, dtype=torch.int64)), TypeError, 'a must', 'int64'),
    'bool b': (dict(b=torch.ones(M, dtype=torch.bool)), TypeError, 'b must', 'bool'),
    'x of rank 1': (dict(x=P['x'][:, 0]), ValueError, 'x must have shape', '(6,)'),
    'y of rank 4': (dict(y=P['y'][None, None]), ValueError, 'y must have shape', '(1, 1, 5, 2)'),
    'x of rank 0': (dict(x=torch.tensor(1.).double()), ValueError, 'x must have shape', '()'),
    'batch of x alone': (dict(x=P['x'][None]), ValueError, 'batch', '(1, 6, 2)'),
    'batches unequal': (dict(x=P['x'].expand(3, -1, -1), y=P['y'].expand(2, -1, -1)), ValueError, 'batch', '(3, 6, 2)', '(2, 5, 2)'),
    'n = 0': (dict(x=P['x'][:0], a=None), ValueError, 'x must hold at least one point', '(0, 2)'),
    'm = 0': (dict(y=P['y'][:0], b=None), ValueError, 'y must hold at least one point', '(0, 2)'),
    'd = 0': (dict(x=P['x'][:, :0], y=P['y'][:, :0]), ValueError, 'x must hold', '(6, 0)'),
    'd unequal': (dict(y=torch.cat([P['y']]*2, 1)), ValueError, 'dimension', '(6, 2)', '(5, 4)'),
    'mixed clouds': (dict(y=P['y'].float()), TypeError, 'x and y', 'float64', 'float32'),
    'mixed weights': (dict(a=P['a'].float()), TypeError, 'a must', 'float32', 'float64'),
    'NaN in x': (dict(x=put(P['x'], nan, 0, 0)), ValueError, 'x must be finite'),
    'inf in y': (dict(y=put(P['y'], -inf, 1, 1)), ValueError, 'y must be finite'),
    'NaN in a': (dict(a=put(P['a'], nan, 0)), ValueError, 'a must be finite'),
    'inf in b': (dict(b=put(P['b'], inf, 0)), ValueError, 'b must be finite'),
    'negative a': (dict(a=put(P['a'], -.1, 0)), ValueError, 'a must be non-negative', '-0.1'),
    'negative b': (dict(b=put(P['b'], -.1, 0), reach=1.), ValueError, 'b must be non-negative', '-0.1'),
    'zero a': (dict(a=torch.zeros(N).double(), reach=1.), ValueError, 'a must have a positive total'),
    'a not one': (dict(a=2*P['a']), ValueError, 'a must sum to 1', '2'),
    'b not one': (dict(b=.9*P['b']), ValueError, 'b must sum to 1', '0.9'),
    'b barely not one': (dict(b=(1+1e-4)*P['b']), ValueError, 'b must sum to 1'),
    'a of a wrong length': (dict(a=torch.full((M,), 1/M).double()), ValueError, 'a must have shape', '(6,)', '(5,)'),
    'a as a column': (dict(a=P['a'][:, None]), ValueError, 'a must have shape', '(6, 1)'),
    'b of rank 0': (dict(b=torch.tensor(1.).double()), ValueError, 'b must have shape', '()'),
    'eps = 0': (dict(eps=0), ValueError, 'eps must be positive', '0'),
    'eps < 0': (dict(eps=-.1), ValueError, 'eps must be positive', '-0.1'),
    'eps NaN': (dict(eps=nan), ValueError, 'eps must be positive', 'nan'),
    'eps inf': (dict(eps=inf), ValueError, 'eps must be positive', 'inf'),
    'eps True': (dict(eps=True), TypeError, 'eps must be', 'True'),
    'eps a string': (dict(eps='0.1'), TypeError, 'eps must be', '0.1'),
    'eps None': (dict(eps=None), TypeError, 'eps must be', 'None'),
    'eps complex': (dict(eps=.1 + 0j), TypeError, 'eps must be', 'complex'),
    'eps a vector': (dict(eps=torch.ones(2)), TypeError, 'eps must be', '(2,)'),
    'eps a list': (dict(eps=[.1]), TypeError, 'eps must be', 'list'),
    'reach = 0': (dict(reach=0), ValueError, 'reach must be positive', '0'),
    'reach < 0': (dict(reach=-1.), ValueError, 'reach must be positive', '-1'),
    'reach_x NaN': (dict(reach_x=nan), ValueError, 'reach_x must be positive', 'nan'),
    'reach_y < 0': (dict(reach_y=-2), ValueError, 'reach_y must be positive', '-2'),
    'reach a string': (dict(reach='far'), TypeError, 'reach must be', 'far'),
    'reach True': (dict(reach=True), TypeError, 'reach must be', 'True'),
    'reach underflows': (dict(reach=1e-200), ValueError, 'reach must', '1e-200'),
    'reach overflows': (dict(reach_y=1e200), ValueError, 'reach_y must', '1e+200'),
    'reach twice': (dict(reach=1., reach_x=1.), ValueError, 'reach'),
    'half_cost = 1': (dict(half_cost=1), TypeError, 'half_cost must be True or False', '1'),
    'half_cost None': (dict(half_cost=None), TypeError, 'half_cost must be True or False', 'None'),
    'unknown backend': (dict(backend='keops'), ValueError, 'backend must be', 'keops', 'streaming'),
    'backend None': (dict(backend=None), ValueError, 'backend must be', 'None'),
    'tol = 0': (dict(tol=0), ValueError, 'tol must be positive', '0'),
    'tol < 0': (dict(tol=-1e-6), ValueError, 'tol must be positive', '-1e-06'),
    'tol NaN': (dict(tol=nan), ValueError, 'tol must be positive', 'nan'),
    'tol a string': (dict(tol='small'), TypeError, 'tol must be', 'small'),
    'max_iter = 0': (dict(max_iter=0), ValueError, 'max_iter must be a positive integer', '0'),
    'max_iter < 0': (dict(max_iter=-3), ValueError, 'max_iter must be a positive integer', '-3'),
    'max_iter 2.5': (dict(max_iter=2.5), (TypeError, ValueError), 'max_iter must be a positive integer', '2.5'),
    'max_iter True': (dict(max_iter=True), (TypeError, ValueError), 'max_iter must be a positive integer', 'True'),
}

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The problems are small: waking a second thread costs more than it does."
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

both = pytest.mark.parametrize('front', [solve, divergence])

def refused(error, words, call, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(error) as e: call(*args, **kw)
    for w in words: assert w in str(e.value), f'{w!r} is not in {e.value}'
    assert len(str(e.value)) < 300

@both
@pytest.mark.parametrize('name', BAD)
def test_arguments(front, name):
    change, error, *words = BAD[name]
    refused(error, words, front, **(P | dict(eps=.1) | change))

@both
def test_keywords(front):
    for kw in (dict(blur=.1), dict(epsilon=.1), dict(Reach=1.), dict(tolerance=1e-3), dict(cost='sqeuclidean')):
        refused(TypeError, list(kw), front, **P, eps=.1, **kw)
    refused(TypeError, ['eps'], front, **P)
    refused(TypeError, [], front, *P.values(), .1)                   # eps is given by name
    refused(TypeError, ['p'], solve(**P, eps=.1).hvp, P['x'], p=2)

@pytest.fixture(scope='module', params=['dense', 'streaming'])
def sol(request): return solve(**P, eps=.1, backend=request.param)

METHODS = {
    'grad z': (lambda s: s.grad('z'), ValueError, 'wrt must be', "'z'"),
    'grad xx': (lambda s: s.grad(('x', 'x')), ValueError, 'wrt must be', "('x', 'x')"),
    'grad empty': (lambda s: s.grad(''), ValueError, 'wrt must be'),
    'grad "xy"': (lambda s: s.grad('xy'), ValueError, 'wrt must be', 'xy'),
    'grad None': (lambda s: s.grad(None), (TypeError, ValueError), 'wrt must be', 'None'),
    'grad 0': (lambda s: s.grad(0), (TypeError, ValueError), 'wrt must be', '0'),
    'hessian f': (lambda s: s.hessian('f'), ValueError, 'wrt must be', 'f'),
    'hessian three': (lambda s: s.hessian(('x', 'y', 'a')), ValueError, 'wrt must be'),
    'hessian (x, g)': (lambda s: s.hessian(('x', 'g')), ValueError, 'wrt must be'),
    'operator': (lambda s: s.hessian_operator('w'), ValueError, 'wrt must be', 'w'),
    'hvp wrt': (lambda s: s.hvp(P['x'], 'X'), ValueError, 'wrt must be', 'X'),
    'hvp NaN': (lambda s: s.hvp(put(P['x'], nan, 0, 0)), ValueError, 'v must be finite'),
    'hvp inf': (lambda s: s.hvp(put(P['x'], inf, 0, 0)), ValueError, 'v must be finite'),
    'hvp numpy': (lambda s: s.hvp(P['x'].numpy()), TypeError, 'v must be a torch.Tensor', 'ndarray'),
    'hvp float32': (lambda s: s.hvp(P['x'].float()), TypeError, 'v must have the dtype', 'float64', 'float32'),
    'hvp integer': (lambda s: s.hvp(P['x'].long()), TypeError, 'v must have the dtype', 'int64'),
    'hvp shape': (lambda s: s.hvp(P['y']), ValueError, 'v must have shape', '(6, 2)', '(5, 2)'),
    'hvp transposed': (lambda s: s.hvp(P['x'].T), ValueError, 'v must have shape', '(6, 2)', '(2, 6)'),
    'hvp flat': (lambda s: s.hvp(P['x'].flatten()), ValueError, 'v must have shape', '(6, 2)', '(12,)'),
    'hvp stack of stacks': (lambda s: s.hvp(P['x'][None, None]), ValueError, 'v must have shape', '(1, 1, 6, 2)'),
    'hvp pair shape': (lambda s: s.hvp(P['x'], ('x', 'y')), ValueError, 'v must have shape', '(5, 2)', '(6, 2)'),
    'hvp weight shape': (lambda s: s.hvp(P['x'], 'b'), ValueError, 'v must have shape', '(5,)', '(6, 2)'),
    'hvp solver': (lambda s: s.hvp(P['x'], solver='lu'), ValueError, 'solver must be', 'lu'),
    'hvp ridge': (lambda s: s.hvp(P['x'], ridge=-1.), ValueError, 'ridge must', '-1'),
    'apply shape': (lambda s: s.apply(P['x']), ValueError, 'V must have shape', '(6, 2)'),
    'apply_t shape': (lambda s: s.apply_t(P['y']), ValueError, 'U must have shape', '(5, 2)'),
    'apply list': (lambda s: s.apply([1.]*M), TypeError, 'V must be a torch.Tensor', 'list'),
    'apply float32': (lambda s: s.apply(P['y'].float()), TypeError, 'V must have the dtype', 'float32'),
    'apply NaN': (lambda s: s.apply(put(P['y'], nan, 0, 0)), ValueError, 'V must be finite'),
    'apply rank 3': (lambda s: s.apply(P['y'][None]), ValueError, 'V must have shape', '(1, 5, 2)'),
}

@pytest.mark.parametrize('name', METHODS)
def test_methods(sol, name):
    call, error, *words = METHODS[name]
    refused(error, words, call, sol)

LATER = {
    'hvp tol = 0': (lambda s: s.hvp(P['x'], tol=0., solver='cg'), ValueError, 'tol must be positive', '0'),
    'hvp tol < 0': (lambda s: s.hvp(P['x'], tol=-1., solver='cg'), ValueError, 'tol must be positive', '-1'),
    'hvp tol a string': (lambda s: s.hvp(P['x'], tol='small', solver='cg'), TypeError, 'tol must be'),
    'hvp max_iter = 0': (lambda s: s.hvp(P['x'], max_iter=0, solver='cg'), ValueError, 'max_iter must be a positive integer', '0'),
    'hvp max_iter 2.5': (lambda s: s.hvp(P['x'], max_iter=2.5, solver='cg'), (TypeError, ValueError), 'max_iter must be a positive integer', '2.5'),
    'hvp ridge NaN': (lambda s: s.hvp(P['x'], ridge=nan, solver='cg'), ValueError, 'ridge must'),
    'hvp ridge a string': (lambda s: s.hvp(P['x'], ridge='1', solver='cg'), TypeError, 'ridge must'),
    'operator keyword': (lambda s: s.hessian_operator('x', ridg=1.), TypeError, 'hessian_operator takes', 'ridg'),
    'init a tensor': (lambda s: solve(**P, eps=.1, init=P['a']), TypeError, 'init must be a Solution'),
    'init a tuple': (lambda s: solve(**P, eps=.1, init=(s.f, s.g)), TypeError, 'init must be a Solution'),
    'init of divergence': (lambda s: divergence(**P, eps=.1, init=s), TypeError, 'init must be a Divergence'),
}

@pytest.mark.parametrize('name', LATER)
def test_options(sol, name):
    call, error, *words = LATER[name]
    refused(error, words, call, sol)

def test_init_of_another_size(sol):
    refused(ValueError, ['init must be a Solution', 'n=6'], solve, P['x'][:3], P['y'], eps=.1, init=sol)

def test_infinite_reach_is_a_hard_marginal():
    assert torch.allclose(solve(**P, eps=.1, reach=inf).value, solve(**P, eps=.1).value, rtol=1e-12)

def test_batch_rules():
    x, y = P['x'].expand(3, -1, -1), P['y'].expand(3, -1, -1)
    refused(ValueError, ['a must have shape', '(3, 6)', '(2, 6)'], solve, x, y, P['a'].expand(2, -1), eps=.1)
    refused(ValueError, ['v must have shape'], solve(x, y, eps=.1).hvp, P['x'])
    refused(ValueError, ['hessian_operator'], solve(x, y, eps=.1).hessian_operator)
    bad = P['a'].expand(3, -1).clone(); bad[1] *= 2
    refused(ValueError, ['a must sum to 1'], solve, x, y, bad, eps=.1)

def test_message_names_the_total_at_fault():
    "In a batch, the total that is reported is one that is wrong."
    bad = P['a'].expand(3, -1).clone(); bad[1] *= 2
    refused(ValueError, ['a must sum to 1', '2'], solve, P['x'].expand(3, -1, -1), P['y'].expand(3, -1, -1), bad, eps=.1)

@both
def test_inputs_are_left_alone(front):
    p = problem(); p['x'].requires_grad_(True)
    before = {k: v.detach().clone() for k, v in p.items()}
    for backend in ('dense', 'streaming'):
        s = front(**p, eps=.1, backend=backend)
        v = torch.randn(N, D).double(); w = v.clone()
        s.value, s.grad('x'), s.hvp(v), s.hessian('x'), s.apply(p['y']), s.plan()
        assert (v == w).all()
    for k in p: assert torch.equal(p[k].detach(), before[k]) and p[k].requires_grad == (k == 'x') and p[k].grad is None

@both
def test_results_are_the_users_own(front):
    "Writing into a result does not change the next one."
    s = front(**P, eps=.1)
    calls = {'value': lambda: s.value, 'f': lambda: s.f, 'g': lambda: s.g, 'grad': lambda: s.grad('x'), 'weights': lambda: s.grad('a'),
             'hvp': lambda: s.hvp(torch.ones(N, D).double()), 'hessian': lambda: s.hessian('a'), 'plan': s.plan}
    first = {k: f().clone() for k, f in calls.items()}
    for k, f in calls.items():
        if k not in ('value', 'f', 'g'): f().zero_()
    for k, f in calls.items(): assert torch.equal(f(), first[k]), k

LEGAL = {
    'eps a 0-d tensor': dict(eps=torch.tensor(.1, dtype=torch.float64)), 'eps float32 numpy': dict(eps=np.float64(.1)),
    'x needs a gradient': dict(x=P['x'].clone().requires_grad_(True)), 'a parameter': dict(x=torch.nn.Parameter(P['x'].clone())),
    'columns first': dict(x=P['x'].T.contiguous().T, y=P['y'].T.contiguous().T), 'strided': dict(x=torch.stack([P['x']]*2, 2)[..., 0], a=torch.stack([P['a']]*3, 1)[:, 1]),
    'strided weights': dict(b=torch.stack([P['b']]*2, 1).flatten()[::2]), 'a leading None': dict(reach=None, reach_x=None),
}

@pytest.mark.parametrize('backend', ['dense', 'streaming'])
@pytest.mark.parametrize('name', LEGAL)
def test_legal(name, backend):
    want, got = solve(**P, eps=.1, backend=backend), solve(**(P | dict(eps=.1) | LEGAL[name]), backend=backend)
    v = torch.randn(N, D, dtype=torch.float64)
    for f in (lambda s: s.value, lambda s: s.grad('x'), lambda s: s.grad('b'), lambda s: s.hvp(v), lambda s: s.hvp(v.T.contiguous().T)):
        assert torch.allclose(f(got), f(want), rtol=1e-9, atol=1e-12)
    assert not any(t.requires_grad for t in (got.grad('x'), got.hvp(v))) and got.value.requires_grad == any(getattr(LEGAL[name].get(k), 'requires_grad', False) for k in 'xyab')
    assert got.value.dtype == torch.float64

def test_a_number_has_no_derivative():
    e, x = torch.tensor(.1, dtype=torch.float64, requires_grad=True), P['x'].clone().requires_grad_()
    for call in (lambda: solve(**P, eps=e), lambda: divergence(**P, eps=e), lambda: ot_cost(x, P['y'], eps=e), lambda: solve(**P, eps=.1, tol=e), lambda: SamplesLoss(blur=e)):
        with pytest.raises(TypeError, match='must not require a gradient'): call()
    assert solve(**P, eps=e.detach()).converged

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_results_keep_the_dtype(dtype):
    for front in (solve, divergence):
        s = front(**problem(dtype), eps=.1)
        v = torch.ones(N, D, dtype=dtype)
        for t in (s.value, s.f, s.g, s.grad('x'), s.grad('a'), s.hvp(v), s.hessian('x'), s.plan(), s.apply(torch.ones(M, dtype=dtype))): assert t.dtype == dtype

@both
@pytest.mark.parametrize('backend', ['dense', 'streaming'])
def test_not_converged_is_said(front, backend):
    with pytest.warns(ConvergenceWarning) as w: s = front(**P, eps=1e-3, max_iter=2, backend=backend)
    text = ' '.join(str(o.message) for o in w)
    assert 'marginal_error' in text and 'max_iter' in text and f'{s.xy.marginal_error if front is divergence else s.marginal_error:.2g}' in text
    assert not s.converged and s.marginal_error > s.tol and 'converged=False' in repr(s)
    with pytest.warns(ConvergenceWarning, match='not converged'): s.hvp(P['x'])
    P_ = s.plan() if front is solve else s.xy.plan()
    if front is solve:                                               # the error that is reported is that of the plan in hand
        e = (P_.sum(1) - P['a']).abs().sum() + (P_.sum(0) - P['b']).abs().sum()
        assert torch.allclose(e, torch.tensor(s.marginal_error, dtype=e.dtype), rtol=1e-3)

@pytest.mark.parametrize('front', [solve, divergence])
def test_cg_stopped_early_is_said(front):
    s = front(**P, eps=.02, backend='streaming')
    with pytest.warns(ConvergenceWarning, match='2 steps.*residual') as w: s.hvp(P['x'], max_iter=2)
    assert not s.cg_info.converged and s.cg_info.n_iter == 2 and f'{s.cg_info.residual:.2g}' in str(w[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s.hvp(P['x'])
    assert s.cg_info.converged and s.cg_info.residual <= 1e-10

def test_the_warning_points_at_the_callers_line():
    with pytest.warns(ConvergenceWarning) as w: solve(**P, eps=1e-3, max_iter=1)
    assert w[0].filename == __file__

def test_tools_name_what_is_wrong():
    from flash_sinkhorn_hessian import SamplesLoss
    from flash_sinkhorn_hessian.flash_sinkhorn import c_transform, from_potentials
    from flash_sinkhorn_hessian.linear_algebra import entropic_map, extreme_eigenvalues, newton_points, spectral_gap
    x, y = P['x'].clone(), P['y']; s, d, zero = solve(x, y, eps=.1), divergence(x, y, eps=.1), torch.zeros(M, dtype=torch.float64)
    for call, kind, word in ((lambda: newton_points(s, maxiter=0), ValueError, 'maxiter'), (lambda: newton_points(s, tol=-1.), ValueError, 'tol'), (lambda: newton_points(s, damping=-1.), ValueError, 'damping'),
                             (lambda: newton_points(s, damping='a'), TypeError, 'damping'), (lambda: newton_points(s, wrt='a'), ValueError, 'wrt'), (lambda: extreme_eigenvalues(s, k=1.5), ValueError, 'k must'),
                             (lambda: c_transform(x, y[:, :1], zero), ValueError, 'y must'), (lambda: c_transform(x, y.float(), zero), TypeError, 'y must'), (lambda: c_transform(x[None], y[None], zero[None]), ValueError, 'x must'),
                             (lambda: from_potentials(x, y, s.f, s.g, eps=.1, tol='a'), TypeError, 'tol'), (lambda: from_potentials(x, y, s.f, s.g, eps=.1, tol=-1), ValueError, 'tol'),
                             (lambda: SamplesLoss(blur=None), ValueError, 'blur'), (lambda: SamplesLoss(eps_list=.1), TypeError, 'eps_list'), (lambda: SamplesLoss(debias='no'), TypeError, 'debias'),
                             (lambda: spectral_gap(d), TypeError, 'Divergence'), (lambda: entropic_map(d, x), TypeError, 'Divergence')):
        with pytest.raises(kind, match=word): call()
    assert torch.isfinite(SamplesLoss(blur=None, eps=.1)(x, y)) and torch.isfinite(newton_points(s, damping=.1)).all()
    z = x.clone(); x.zero_()
    with pytest.raises(RuntimeError, match='in place'): entropic_map(s, z)
