"""SamplesLoss against GeomLoss on a grid of settings, its second derivative, and its manners as a PyTorch module."""
import copy, gc, itertools, os, pickle, subprocess, sys, warnings, weakref

import geomloss
import pytest
import torch
import torch.utils.checkpoint
from geomloss._legacy.sinkhorn_divergence import epsilon_schedule
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import grad as fgrad, hessian, vmap

from flash_sinkhorn_hessian import ConvergenceWarning, SamplesLoss, divergence, solve
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.samples_loss import diameter_of

REACHES = (None, .1, 1.)
BLURS, SCALINGS, DIMENSIONS = (.01, .1, 1.), (.5, .95), (1, 3, 50)

def leaves(P): return {u: t.clone().requires_grad_() for u, t in P.items()}
def call(L, P): return L(P["a"], P["x"], P["b"], P["y"])
def value_and_grads(L, P):
    Q = leaves(P); v = call(L, Q)
    return v.detach(), dict(zip(Q, grad(v.sum(), list(Q.values()))))

def dense_loop(P, blur, scaling, rho_x, rho_y, debias=True):
    "GeomLoss's loop with a penalty of its own for each side, from nothing but PyTorch."
    def term(x, y, a, b):
        C, la, lb = torch.cdist(x, y)**2/2, a.log(), b.log()
        damp = lambda e, r: 1/(1 + e/r)
        row, col = (lambda e, g: -damp(e, rho_x)*e*torch.logsumexp(lb + (g - C)/e, 1)), (lambda e, f: -damp(e, rho_y)*e*torch.logsumexp(la[:, None] + (f[:, None] - C)/e, 0))
        e = levels[0]; f, g = row(e, 0*b), col(e, 0*a)
        for e in levels: f, g = (f + row(e, g))/2, (g + col(e, f))/2
        f, g = row(e, g), col(e, f)
        side = lambda w, f, r: ((r + e/2)*w*(1 - (-f/r).exp())).sum()
        return side(a, f, rho_x) + side(b, g, rho_y), f, g
    x, y, a, b = P.values(); levels = epsilon_schedule(2, diameter_of(x, y), blur, scaling)
    value, f, g = term(x, y, a, b)
    return (value - (term(x, x, a, a)[0] + term(y, y, b, b)[0])/2 if debias else value), f, g

@pytest.mark.parametrize("backend", ("dense", "streaming"))
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("uniform", (True, False))
def test_grid_against_geomloss(backend, reach, uniform):
    grid = list(itertools.product(DIMENSIONS, BLURS, SCALINGS, (True, False)))
    for k, (d, blur, scaling, debias) in enumerate(grid):
        if backend == "streaming" and k % 5: continue            # the same loop: every fifth setting is enough
        P = random_problem(37, 53, d, seed=k, uniform=uniform)
        kw = dict(blur=blur, scaling=scaling, reach=reach, debias=debias)
        theirs = lambda **extra: geomloss.SamplesLoss("sinkhorn", p=2, backend="tensorized", **kw, **extra)
        ours = lambda **extra: SamplesLoss("sinkhorn", p=2, backend=backend, **kw, **extra)
        (V, G), (v, g) = value_and_grads(theirs(), P), value_and_grads(ours(), P)
        assert abs(v - V) < 1e-9, (d, kw)
        for s, t in zip(call(ours(potentials=True), P), call(theirs(potentials=True), P)): assert (s - t[0]).abs().max() < 1e-9, (d, kw)
        if reach is None:
            for u in P: assert (g[u] - G[u]).norm() < 1e-8*max(G[u].norm(), 1e-3), (d, kw, u)
        else:                                                      # the one factor by which GeomLoss is off, and the constant
            factor, const = (reach**2 + blur**2)/(reach**2 + blur**2/2), 0. if debias else blur**2/2
            for u in P: assert (g[u] + const*(u in "ab") - factor*G[u]).norm() < 1e-8*max(G[u].norm(), 1e-3), (d, kw, u)

@pytest.mark.parametrize("debias", (True, False))
@pytest.mark.parametrize("reaches", ((.3, 1.), (1., .1)))
def test_two_penalties_against_a_dense_loop(debias, reaches):
    for d, blur, scaling in itertools.product((1, 3, 50), (.05, .5), (.5, .9)):
        P = random_problem(20, 30, d)
        value, f, g = dense_loop(P, blur, scaling, reaches[0]**2, reaches[1]**2, debias)
        kw = dict(blur=blur, scaling=scaling, reach_x=reaches[0], reach_y=reaches[1], debias=debias)
        assert abs(call(SamplesLoss(**kw), P) - value) < 1e-10*max(1, .01*abs(value))      # one of them is 38,025, whose last place is worth 7e-12
        if not debias: assert all((s - t).abs().max() < 1e-10 for s, t in zip(call(SamplesLoss(potentials=True, **kw), P), (f, g)))

@pytest.mark.parametrize("kw", (dict(), dict(reach=.5), dict(reach_x=.5), dict(reach_y=.5), dict(reach_x=.5, reach_y=1.)))
@pytest.mark.parametrize("debias", (True, False))
@pytest.mark.parametrize("half", (True, False))
def test_a_slow_schedule_ends_at_solve(kw, debias, half):
    P = random_problem(20, 30, 2)
    L = SamplesLoss(eps=.2, n_iters=3000, use_epsilon_scaling=False, threshold=1e-14, debias=debias, half_cost=half, **kw)
    sol = (divergence if debias else solve)(*P.values(), eps=.2, half_cost=half, **kw)
    v, g = value_and_grads(L, P)
    assert abs(v - sol.value) < 1e-10
    for u in P:
        diff = g[u] - sol.grad(u)
        assert (diff - diff.mean()*(u in "ab")).abs().max() < 1e-9

@pytest.mark.parametrize("kw", (dict(), dict(reach=.7), dict(reach_x=.7), dict(reach_y=.7, debias=False), dict(reach_x=.7, reach_y=1.3), dict(reach=.7, debias=False)))
def test_gradcheck(kw):
    hard, P = not any("reach" in k for k in kw), random_problem(2, 3, 2)
    L = SamplesLoss(eps=.4, n_iters=200, use_epsilon_scaling=False, threshold=1e-14, **kw)
    if hard: f = lambda x, y, a, b: L(a.softmax(-1), x, b.softmax(-1), y)
    else: f = lambda x, y, a, b: L(1.3*a, x, b, y)                         # totals that differ
    p = [(t.log() if hard and t.ndim == 1 else t).clone().requires_grad_() for t in P.values()]
    assert gradcheck(f, p, eps=1e-5, atol=1e-6) and gradgradcheck(f, p, eps=1e-5, atol=1e-6, rtol=1e-4)

@pytest.mark.parametrize("backend", ("dense", "streaming"))
@pytest.mark.parametrize("kw", (dict(), dict(reach=.3), dict(reach_x=.3)))
def test_double_backward_from_an_unconverged_call(kw, backend):
    P = random_problem(30, 40, 3)
    for blur, debias in itertools.product((.03, .2), (True, False)):
        Q, v = leaves(P), torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        g, = grad(call(SamplesLoss(blur=blur, debias=debias, backend=backend, **kw), Q), Q["x"], create_graph=True)
        sol = (divergence if debias else solve)(*P.values(), eps=blur**2, half_cost=True, **kw)
        for u, t in zip("xy", grad((g*v).sum(), (Q["x"], Q["y"]))):
            want = sol.hvp(v, (u, "x"))
            assert (t - want).norm() < 1e-6*want.norm()

def test_batches_labels_and_shapes():
    B = random_problem(20, 30, 3, batch=3)
    ours, theirs = SamplesLoss(), geomloss.SamplesLoss()
    for a, b in ((B["a"], B["b"]), (B["a"][..., None], B["b"][..., None])):
        assert torch.allclose(ours(a, B["x"], b, B["y"]), theirs(a, B["x"], b, B["y"]), atol=1e-12)
    assert torch.allclose(ours(B["x"], B["y"]), theirs(B["x"], B["y"]), atol=1e-12) and ours(B["x"][:1], B["y"][:1]).shape == (1,)
    P = random_problem(20, 30, 3); args = P["a"], P["x"], P["b"], P["y"]
    assert torch.equal(ours(torch.arange(20), *args[:2], torch.arange(30)[:, None], *args[2:]), ours(*args))
    x = B["x"].clone().requires_grad_(); X = B["x"].clone().requires_grad_()
    assert torch.allclose(grad(ours(x, B["y"]).sum(), x)[0], grad(theirs(X, B["y"]).sum(), X)[0], atol=1e-12)

def test_extreme_inputs():
    P = random_problem(20, 30, 3)
    z = P["a"].clone(); z[:5] = 0; z /= z.sum()
    for kw in (dict(), dict(reach=.5)):
        got, want = SamplesLoss(**kw)(z, P["x"], P["b"], P["y"]), SamplesLoss(**kw)(z[5:], P["x"][5:], P["b"], P["y"])
        assert torch.allclose(got, SamplesLoss(diameter=diameter_of(P["x"], P["y"]), **kw)(z[5:], P["x"][5:], P["b"], P["y"]), atol=1e-12) and abs(got - want) < 1e-2
        Q = leaves(P | {"a": z}); assert all(torch.isfinite(t).all() for t in grad(call(SamplesLoss(**kw), Q), list(Q.values())))
    one = torch.zeros(1, 2)
    assert SamplesLoss()(one, one) == 0 and abs(SamplesLoss()(one, one + 1) - 1) < 1e-6
    far = {u: (t + 1000*(u in "xy")).float() for u, t in P.items()}
    near = {u: (far[u].double() - 1000*(u in "xy")) for u in far}
    assert abs(call(SamplesLoss(), far) - call(SamplesLoss(), {u: t/t.sum() if t.ndim == 1 else t for u, t in near.items()})) < 1e-5

def test_settings_of_flash_sinkhorn():
    P = random_problem(20, 30, 3)
    fixed = dict(use_epsilon_scaling=False, eps=.1)
    assert abs(call(SamplesLoss(n_iters=5, **fixed), P) - call(SamplesLoss(n_iters=2000, **fixed), P)) > 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early = call(SamplesLoss(n_iters=5000, threshold=1e-10, inner_iterations=5, **fixed), P)
    assert abs(early - call(SamplesLoss(n_iters=5000, **fixed), P)) < 1e-9
    with pytest.warns(ConvergenceWarning, match="not confirmed"): call(SamplesLoss(n_iters=10, threshold=1e-12, **fixed), P)
    assert call(SamplesLoss(last_extrapolation=False), P) != call(SamplesLoss(), P)
    assert torch.allclose(call(SamplesLoss(half_cost=False, blur=.1*2**.5, diameter=2**.5), P), 2*call(SamplesLoss(blur=.1, diameter=1.), P))
    assert torch.allclose(SamplesLoss(normalize=True)(3*P["a"], P["x"], 5*P["b"], P["y"]), call(SamplesLoss(), P))
    assert torch.equal(call(SamplesLoss(reach_x=.5, reach_y=.5), P), call(SamplesLoss(reach=.5), P))

def test_what_is_out_of_scope_says_who_has_it():
    for kw in (dict(loss="gaussian"), dict(loss="energy"), dict(loss="laplacian"), dict(loss="hausdorff"), dict(p=1), dict(cost=lambda x, y: 0), dict(kernel=1)):
        with pytest.raises(ValueError, match="GeomLoss"): SamplesLoss(**kw)
    with pytest.raises(ValueError, match="'sinkhorn'"): SamplesLoss("mmd")
    with pytest.raises(TypeError): SamplesLoss(blurr=.1)
    for name in ("blur", "scaling", "diameter", "reach", "reach_x", "eps", "n_iters", "threshold", "inner_iterations"):
        with pytest.raises((ValueError, TypeError), match=name): SamplesLoss(**{name: -1})

def test_module_manners():
    P = random_problem(20, 30, 3)
    L = SamplesLoss(blur=.1, reach=.5)
    for M in (pickle.loads(pickle.dumps(L)), copy.deepcopy(L), L.to("cpu").double()): assert torch.equal(call(M, P), call(L, P)) and repr(M) == repr(L)
    assert "blur=0.1" in repr(L) and "reach=0.5" in repr(L)
    with torch.no_grad(): assert not call(L, leaves(P)).requires_grad
    Q = leaves({u: t.float() for u, t in P.items()})
    v = call(L, Q); assert v.dtype == torch.float32 and all(t.dtype == torch.float32 for t in grad(v, list(Q.values())))
    assert abs(v - call(L, P)) < 1e-6

def test_functional_transforms():
    P = random_problem(10, 12, 2); x, y, a, b = P.values()
    L = SamplesLoss(blur=.3, diameter=2.)
    f, X = (lambda x: L(a, x, b, y)), torch.stack([x, x + .1, 2*x])
    assert torch.allclose(vmap(f)(X), torch.stack([f(z) for z in X]), atol=1e-12)
    assert torch.allclose(vmap(fgrad(f))(X), torch.stack([fgrad(f)(z) for z in X]), atol=1e-12)
    H = torch.stack([divergence(z, y, a, b, eps=.09, half_cost=True).hessian() for z in X])
    assert torch.allclose(vmap(hessian(f))(X), H, atol=1e-9)

def test_potentials_under_transforms():
    P = random_problem(10, 12, 2); x, y, a, b = P.values()
    L = SamplesLoss(blur=.3, diameter=2., potentials=True)
    X, w = torch.stack([x, x + .1, 2*x]), torch.randn(10, dtype=torch.float64)
    for got, want in zip(vmap(lambda z: L(a, z, b, y))(X), zip(*(L(a, z, b, y) for z in X))): assert torch.allclose(got, torch.stack(want), atol=1e-12)
    z = x.clone().requires_grad_(); f = lambda z: (L(a, z, b, y)[0]*w).sum()
    assert torch.equal(fgrad(f)(x), grad(f(z), z)[0])
    assert torch.allclose(vmap(fgrad(f))(X)[1], fgrad(f)(X[1]), atol=1e-12)
    J = torch.func.jacrev(lambda z: L(a, z, b, y)[1])(x); assert J.shape == (12, 10, 2)

LOADER = """
import sys, torch
from torch.autograd import grad
from flash_sinkhorn_hessian import SamplesLoss
class Losses(torch.utils.data.Dataset):
    "Values and gradients, computed where the data are loaded."
    def __init__(self): self.L, self.x = SamplesLoss(blur=.1, backend="streaming"), torch.randn(3, 600, 3, generator=torch.Generator().manual_seed(0))
    def __len__(self): return 3
    def __getitem__(self, k): x = self.x[k].clone().requires_grad_(); v = self.L(x, self.x[0] + 1); return torch.stack([v.detach(), grad(v, x)[0].norm()])
if __name__ == "__main__":
    data = Losses(); want = torch.stack([data[k] for k in range(3)])          # here first: the workers must not wait for these threads
    assert torch.equal(torch.cat(list(torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context="fork", timeout=60))), want)
    assert "jax" not in sys.modules
"""

def test_in_the_workers_of_a_data_loader(tmp_path):
    "Forked ones, in a process of their own: this one may have JAX in it, whose threads do not survive a fork."
    (tmp_path/"loader.py").write_text(LOADER)
    done = subprocess.run([sys.executable, tmp_path/"loader.py"], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120)     # beside a GPU no fork may follow a backward pass, says PyTorch
    assert done.returncode == 0, done.stderr[-2000:]

def test_manners_of_a_call():
    P = random_problem(20, 30, 3); x, y, a, b = P.values(); L = SamplesLoss()
    for args, error, word in (((x,), TypeError, "got 1 arg"), ((a, x, y), TypeError, "got 3 arg"), ((x[:0], y), ValueError, "x must hold"), ((x, y[:, :2]), ValueError, "dimension"),
                              ((-a, x, b, y), ValueError, "a must be non-negative"), ((a, x.float(), b, y.float()), TypeError, "a must have the dtype"), ((x[None], y), ValueError, "batch"),
                              ((torch.arange(3), a, x, None, b, y), ValueError, "labels_x"), ((x*float("nan"), y), ValueError, "x must be finite"), ((x.numpy(), y), TypeError, "x must be a torch.Tensor")):
        with pytest.raises(error, match=word): L(*args)
    with pytest.raises(TypeError, match="forward"): L(x=x, y=y)
    for u, v in ((x.mT.contiguous().mT, y), (torch.cat([x, x], 1)[:, :3], y.flip(0).flip(0))): assert torch.allclose(L(u, v), L(x, y), atol=1e-15)
    for u, v in ((x[:1].expand(20, 3), y), (x[:, :1], y[:, :1]), (x[:1], y[:1])): assert abs(L(u, v) - geomloss.SamplesLoss()(u, v)) < 1e-13
    assert abs(L(x, x)) < 1e-15
    with torch.inference_mode(): assert L(x, y) == L(x, y)
    z = x.clone().requires_grad_(); v = torch.utils.checkpoint.checkpoint(lambda t: L(t, y), z, use_reentrant=False)
    assert torch.equal(grad(v, z)[0], fgrad(lambda t: L(t, y))(x))
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), L); assert list(net.state_dict()) == ["0.weight", "0.bias"] and not list(L.parameters())

@pytest.mark.parametrize("kw", (dict(), dict(reach=.5, debias=False), dict(backend="streaming")))
def test_compiles_without_a_graph_break(kw):
    P = random_problem(10, 12, 2); x, y, a, b = P.values()
    L = SamplesLoss(blur=.2, **kw)
    f = lambda x, a: L(a/a.sum(), 2*x, b, y)**2
    c = torch.compile(f, fullgraph=True, backend="aot_eager")
    for blur in (.2, .1):
        L.blur = blur
        p, q = ([t.clone().requires_grad_() for t in (x, a)] for _ in range(2))
        assert torch.equal(c(*p), f(*q)) and all(torch.allclose(s, t, atol=1e-14) for s, t in zip(grad(c(*p), p), grad(f(*q), q)))
    batch = torch.compile(lambda x: L(x, y.expand(2, -1, -1)), fullgraph=True, backend="aot_eager")(torch.stack([x, x]))
    assert batch.shape == (2,)

def test_the_compiler_is_told_the_true_layout():
    "A compiled program relies on the strides that the fake operators promise: for points in any layout, in one problem or many."
    from torch._subclasses.fake_tensor import FakeTensorMode
    from flash_sinkhorn_hessian import autograd, samples_loss
    x, y, v = torch.randn(3, 20, 2).permute(2, 1, 0), torch.randn(3, 2, 22).permute(1, 2, 0), torch.randn(20, 3, 2).permute(2, 0, 1)
    mode, settings = FakeTensorMode(), samples_loss.SamplesLoss()._settings()
    cost = True, .1, None, None, None, False, None, 5000, "auto"
    def check(op, *args):
        fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else [*map(fake, t)] if isinstance(t, list) else t
        with mode: said = op(*map(fake, args))
        got = op(*args); pairs = [(said, got)] if isinstance(got, torch.Tensor) else list(zip(said, got, strict=True))
        assert all((s.shape, s.stride(), s.dtype) == (t.shape, t.stride(), t.dtype) for s, t in pairs), op
        return got
    for x, y, v in ((x, y, v), (x[0], y[0], v[0])):
        state = check(samples_loss._loss_op, x, y, None, None, *settings)[1:]
        check(samples_loss._gradient_op, x, y, None, None, state, "xy", *settings)
        state = check(autograd._cost_op, x, y, None, None, *cost)[1:]
        check(autograd._cost_gradient_op, x, y, None, None, state, "xy", *cost)
        check(autograd._cost_product_op, x, y, None, None, v, "x", "x", *cost)

@pytest.mark.slow
def test_compiles_with_the_default_compiler():
    x = random_problem(10, 12, 2)["x"].requires_grad_(); L = SamplesLoss()
    c = torch.compile(lambda x: L(2*x, x.detach() + 1)**2, fullgraph=True)
    assert torch.allclose(grad(c(x), x)[0], grad(L(2*x, x.detach() + 1)**2, x)[0])

def training(steps, seed=0):
    torch.manual_seed(seed)
    net, y = torch.nn.Linear(3, 2), torch.randn(40, 2)
    opt, L, out = torch.optim.SGD(net.parameters(), .1), SamplesLoss(blur=.2), []
    for _ in range(steps):
        loss = L(net(torch.randn(30, 3)), y)
        opt.zero_grad(); loss.backward(); opt.step(); out.append(loss.item())
        yield out

def test_same_numbers_twice():
    torch.use_deterministic_algorithms(True)
    try: one, two = list(training(10))[-1], list(training(10))[-1]
    finally: torch.use_deterministic_algorithms(False)
    assert one == two

def test_nothing_outlives_its_graph():
    Q = leaves(random_problem(20, 30, 3)); v = call(SamplesLoss(), Q)
    sol = weakref.ref(v.grad_fn.point.sol)
    grad(v, Q["x"]); del v
    gc.disable()
    try: assert sol() is None
    finally: gc.enable()

@pytest.mark.parametrize("backend", ("dense", "streaming"))
def test_a_step_frees_its_memory_at_once(backend, young_heap):
    "Nothing of a value and its gradient waits for the garbage collector."
    P, L = random_problem(20, 30, 3), SamplesLoss(backend=backend)
    def step(P): x = P["x"].clone().requires_grad_(); grad(L(P["a"], x, P["b"], P["y"]).sum(), x)
    alive = lambda: sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for P in (P, random_problem(20, 30, 3, batch=2)):
        step(P); gc.collect(); gc.disable()
        try:
            before = alive(); step(P); step(P)
            assert alive() == before
        finally: gc.enable()

def test_column_sums_repeat_themselves():
    "However many threads there are, their sums are added in the order of their rows."
    from flash_sinkhorn_hessian.dual_energy import Problem
    from flash_sinkhorn_hessian.sinkhorn import alternate
    from flash_sinkhorn_hessian.streaming import StreamingGeometry
    q, threads = random_problem(1200, 1100), torch.get_num_threads()
    p = Problem(StreamingGeometry(q["x"], q["y"], .05), q["a"], q["b"])
    torch.set_num_threads(4)
    try:
        f, g, _ = alternate(p, 0*q["a"], 0*q["b"])
        first = alternate(p, f, g)[1]
        assert all(torch.equal(alternate(p, f, g)[1], first) for _ in range(30))
    finally: torch.set_num_threads(threads)

def test_steps_leak_nothing(young_heap):
    "What is alive after a step, tensors and solutions, does not grow; the slow test below counts bytes over a thousand."
    def alive(): gc.collect(); return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()), sum(type(o).__name__ in ("Estimate", "Solution", "Annealed", "Problem") for o in gc.get_objects())
    counts = [alive() for k, _ in enumerate(training(60)) if k % 10 == 9]
    assert len(set(counts[1:])) == 1, counts

@pytest.mark.slow
def test_a_thousand_steps_leak_nothing():
    code = """
import resource, sys; sys.path.insert(0, 'tests')
from test_samples_loss import training
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
for k, _ in enumerate(training(1100)):
    if k == 100: start = peak()
print(peak() - start)
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    grown = float(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout)
    assert grown < 8, f"{grown:.1f} MiB more after 1000 steps"
