"""Double backward, torch.func and mixed precision against the methods of the solution, over all settings."""
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import grad as fgrad, hessian, jvp, vmap

from flash_sinkhorn_hessian import divergence, ot_cost, ot_hvp, sinkhorn_divergence, sinkhorn_divergence_hvp, solve
from flash_sinkhorn_hessian.autograd import joint_gradient
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.gradient import centred

FORMS = ((ot_cost, solve), (sinkhorn_divergence, divergence))
PENALTIES = (dict(), dict(reach=.7), dict(reach_x=.7), dict(reach_y=1.1), dict(reach_x=.7, reach_y=1.3))
ids = lambda kw: ",".join(f"{k}={v}" for k, v in kw.items()) or "balanced"

def leaves(P): return {u: t.clone().requires_grad_() for u, t in P.items()}

@pytest.mark.parametrize("make", (solve, divergence))
@pytest.mark.parametrize("kw", PENALTIES, ids=ids)
def test_gradcheck_in_everything(make, kw):
    P = random_problem(3, 4, 2)
    f = lambda *p: make(*p, eps=.2, tol=1e-13, half_cost="reach_x" in kw, **kw).value
    p = list(leaves(P).values())
    assert gradcheck(f, p, eps=4e-7, atol=1e-6)
    assert gradgradcheck(f, p, eps=4e-7, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("kw,backend", [(kw, "dense") for kw in PENALTIES] + [(PENALTIES[0], "streaming"), (PENALTIES[-1], "streaming")])
@pytest.mark.parametrize("form", (0, 1))
def test_every_block_against_the_dense_hessian(form, kw, backend):
    f, make = FORMS[form]
    P = random_problem(7, 9, 3, seed=1)
    sol, Q = make(*P.values(), eps=.1, **kw), leaves(P)
    g = dict(zip(Q, grad(f(*Q.values(), eps=.1, backend=backend, **kw), list(Q.values()), create_graph=True)))
    hard = not kw
    for w in P:
        v = torch.randn(P[w].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if w in "ab" and hard: v = centred(v)
        out = dict(zip(Q, grad((g[w]*v).sum(), list(Q.values()), retain_graph=True)))
        for u in P:
            H = sol.hessian((u, w))
            want = torch.tensordot(H, v, v.ndim)
            got = centred(out[u]) if u in "ab" and hard else out[u]
            assert (got - want).norm() <= 1e-8*max(1., want.norm()) + (1e-8 if w in "ab" else 0), (u, w)

@pytest.mark.parametrize("form", (0, 1))
@pytest.mark.parametrize("kw", PENALTIES[:3], ids=ids)
def test_batch_is_its_problems(form, kw):
    f, make = FORMS[form]
    B = random_problem(5, 6, 2, batch=3)
    Q = leaves(B)
    value = f(*Q.values(), eps=.1, **kw)
    w = torch.tensor([1., -2., .5], dtype=torch.float64)
    g = dict(zip(Q, grad((w*value).sum(), list(Q.values()), create_graph=True)))
    v = {u: torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype) for u, t in B.items()}
    h = dict(zip(Q, grad(sum((g[u]*v[u]).sum() for u in Q), list(Q.values()))))
    for k in range(3):
        q = {u: t[k].clone().requires_grad_() for u, t in B.items()}
        gk = dict(zip(q, grad(f(*q.values(), eps=.1, **kw), list(q.values()), create_graph=True)))
        hk = dict(zip(q, grad(sum((gk[u]*v[u][k]).sum() for u in q), list(q.values()))))
        for u in q: assert torch.allclose(g[u][k], w[k]*gk[u], atol=1e-9) and torch.allclose(h[u][k], w[k]*hk[u], atol=1e-8)

def test_value_of_solve_belongs_to_the_graph():
    P = random_problem(6, 7, 2); Q = leaves(P)
    for make, (f, _) in zip((solve, divergence), FORMS):
        sol = make(*Q.values(), eps=.1)
        assert sol.value.requires_grad and torch.equal(sol.value, f(*P.values(), eps=.1))
        for u, t in zip(Q, grad(sol.value**2, list(Q.values()))):
            assert torch.allclose(t, 2*sol.value.detach()*joint_gradient(sol, (u,), Q)[u])
        assert not any(t.requires_grad for t in (sol.f, sol.g, sol.plan(), sol.grad("x"), sol.hvp(P["x"])))
        with torch.no_grad(): assert not make(*Q.values(), eps=.1).value.requires_grad
        assert not make(*P.values(), eps=.1).value.requires_grad
        one = make(Q["x"], P["y"], eps=.1).value                     # some of them, and no weights
        assert grad(one, Q["x"])[0].shape == P["x"].shape
        sol.value.backward()
        assert all(t.grad is not None for t in Q.values())
        for t in Q.values(): t.grad = None

def test_a_change_in_place_is_noticed():
    x = random_problem(6, 7, 2)["x"].requires_grad_(); y = x.detach() + .1
    sol = solve(x, y, eps=.1); value = sol.value
    with torch.no_grad(): x += 1
    with pytest.raises(RuntimeError, match="changed in place"): sol.value
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): value.backward()

@pytest.mark.parametrize("form", (0, 1))
def test_third_derivative_says_so(form):
    f, _ = FORMS[form]
    P = random_problem(4, 5, 2); x = P["x"].requires_grad_()
    g, = grad(f(x, P["y"], eps=.1), x, create_graph=True)
    h, = grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"): grad(h.sum(), x)

@pytest.mark.parametrize("form", (0, 1))
@pytest.mark.parametrize("kw", PENALTIES[:3], ids=ids)
def test_functional_transforms(form, kw):
    f, make = FORMS[form]
    P = random_problem(5, 6, 2); x, y, a, b = P.values()
    at = lambda x, a=a: f(x, y, a, b, eps=.1, **kw)
    S, v = make(x, y, a, b, eps=.1, **kw), torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fgrad(at)(x), S.grad(), atol=1e-12)
    assert torch.allclose(jvp(at, (x,), (v,))[1], (S.grad()*v).sum(), atol=1e-12)
    assert torch.allclose(jvp(fgrad(at), (x,), (v,))[1], S.hvp(v), atol=1e-10)
    assert torch.allclose(hessian(at)(x), S.hessian(), atol=1e-10)
    assert torch.allclose(vmap(lambda v: jvp(fgrad(at), (x,), (v,))[1])(torch.stack([v, 2*v])), torch.stack([S.hvp(v), 2*S.hvp(v)]), atol=1e-10)
    X, A = torch.stack([x, x + .2]), torch.stack([a, a.flip(0)])
    many = [make(z, y, w, b, eps=.1, **kw) for z, w in zip(X, A)]
    assert torch.allclose(vmap(at)(X, A), torch.stack([s.value for s in many]), atol=1e-10)
    assert torch.allclose(vmap(hessian(at))(X, A), torch.stack([s.hessian() for s in many]), atol=1e-9)
    assert torch.allclose(vmap(fgrad(at, argnums=1))(X, A), torch.stack([joint_gradient(s, ("a",))["a"] for s in many]), atol=1e-10)
    assert torch.allclose(vmap(lambda x: vmap(lambda a: at(x, a))(A))(X)[1, 0], at(X[1], A[0]), atol=1e-10)

@pytest.mark.parametrize("backend", ("dense", "streaming"))
def test_precisions(backend):
    P = random_problem(30, 40, 3)
    for dtype, tol in ((torch.float32, 1e-4), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        x = P["x"].to(dtype).requires_grad_(); y = P["y"].to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16): value = divergence(x, y, eps=.1, backend=backend).value
        g, = grad(value, x, create_graph=True)
        h, = grad(g.float().sum(), x)
        assert value.dtype == torch.float32 and g.dtype == h.dtype == dtype
        want = divergence(x.detach().double(), y.double(), eps=.1).grad()
        assert (g.double() - want).norm() <= tol*want.norm()

def test_bad_input_is_the_same_error_as_in_solve():
    P = random_problem(5, 6, 2); x, y, a, b = P.values()
    for f, _ in FORMS:
        for args, kw, error, word in (((x.numpy(), y), dict(eps=.1), TypeError, "x must be a torch.Tensor"), ((x, y, 2*a), dict(eps=.1), ValueError, "a must sum to 1"),
                                      ((x, y, a[:2]), dict(eps=.1), ValueError, "a must have shape"), ((x, y), dict(eps=-1), ValueError, "eps must be positive"),
                                      ((x, y.float()), dict(eps=.1), TypeError, "one dtype"), ((x, y), dict(eps=.1, reach=1, reach_x=1), ValueError, "reach sets both")):
            with pytest.raises(error, match=word): f(*args, **kw)

@pytest.mark.parametrize("backend", ("dense", "streaming"))
@pytest.mark.parametrize("d", (3, 24))
def test_autocast_around_everything(backend, d):
    "solve and all of its methods give under autocast what they give without."
    P = {k: t.float() for k, t in random_problem(30, 40, d).items()}; v = torch.randn(30, d, generator=torch.Generator().manual_seed(0))
    def everything():
        out = []
        for make in (solve, divergence):
            s = make(**P, eps=.1*d, backend=backend)
            out += [s.value, s.f, s.g, s.grad(), s.grad("a"), s.hvp(v), s.hvp(v, ("y", "x")), s.plan(), s.apply(P["y"]), s.hessian("a")]
        return out
    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16): mixed = everything()
    assert all(torch.equal(s, t) for s, t in zip(plain, mixed))

@pytest.mark.parametrize("form", (0, 1))
def test_compiled_batches_and_defaults(form):
    f, make = FORMS[form]
    B = random_problem(6, 7, 2, batch=3); x, y, a, b = B.values()
    c = torch.compile(lambda x, a: f(x, y, a, b, eps=.1).square(), fullgraph=True, backend="aot_eager")
    p, q = ([t.clone().requires_grad_() for t in (x, a)] for _ in range(2))
    assert torch.allclose(c(*p), f(q[0], y, q[1], b, eps=.1)**2, atol=1e-14)
    for s, t in zip(grad(c(*p).sum(), p), grad((f(q[0], y, q[1], b, eps=.1)**2).sum(), q)): assert torch.allclose(s, t, atol=1e-12)
    v, shared = torch.randn(2, 3, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), a[0]
    product = (ot_hvp, sinkhorn_divergence_hvp)[form]
    c = torch.compile(lambda v: product(v, x, y, shared, b, eps=.1, wrt=("y", "x")), fullgraph=True, backend="aot_eager")
    assert torch.allclose(c(v), make(x, y, shared, b, eps=.1).hvp(v, ("y", "x")), atol=1e-10)

@pytest.mark.slow
@pytest.mark.parametrize("form", (0, 1))
def test_compiled_with_the_default_compiler(form):
    f, make = FORMS[form]; x, y, a, b = random_problem(6, 7, 2).values(); X = x.clone().requires_grad_(); product = (ot_hvp, sinkhorn_divergence_hvp)[form]
    c = torch.compile(lambda x: f(2*x, y, a, b, eps=.1)**2, fullgraph=True)
    assert torch.allclose(grad(c(X), X)[0], grad(f(2*X, y, a, b, eps=.1)**2, X)[0], atol=1e-12)
    assert torch.allclose(torch.compile(lambda v: 2*product(v, x, y, a, b, eps=.1), fullgraph=True)(x), 2*make(x, y, a, b, eps=.1).hvp(x), atol=1e-10)

@pytest.mark.parametrize('backend', ['auto', 'dense', 'streaming'])
@pytest.mark.parametrize('make', [solve, divergence])
def test_a_value_inside_torch_func(make, backend):
    "Every transform of the value, forward mode too, on backends with compiled kernels; whatever else the solution computes raises there."
    import torch.autograd.forward_ad as forward
    x, y, v = torch.rand(5, 2).double(), torch.rand(6, 2).double(), torch.randn(5, 2).double(); F = lambda x: make(x, y, eps=.1, backend=backend).value
    s = make(x, y, eps=.1); g, H = s.grad(), s.hessian(); close = lambda got, want: torch.allclose(got, want, rtol=1e-8, atol=1e-9)
    assert close(torch.func.grad(F)(x), g) and close(torch.func.jvp(F, (x,), (v,))[1], (g*v).sum()) and close(torch.func.jacfwd(F)(x), g)
    assert close(torch.func.hessian(F)(x), H) and close(torch.func.jacrev(torch.func.jacrev(F))(x), H)
    with forward.dual_level(): assert close(forward.unpack_dual(F(forward.make_dual(x, v))).tangent, (g*v).sum())
    assert close(torch.func.grad(lambda w: (w*make(x, y, eps=.1, backend=backend).grad()).sum())(v), g)     # the solution is a constant there
    for f in (lambda x: make(x, y, eps=.1, backend=backend).grad().sum(), lambda x: make(x, y, eps=.1, backend=backend).f.sum()):
        with pytest.raises(RuntimeError, match='torch.func'): torch.func.grad(f)(x)
    with pytest.raises(RuntimeError, match='vmap'): torch.func.vmap(F)(x[None])
    with pytest.raises(TypeError, match='eps'): torch.func.grad(lambda e: ot_cost(x, y, eps=e))(torch.tensor(.1))

def test_hessians_at_an_isolated_point_without_weight():
    x, y, b = torch.tensor([[0.], [1.]]).double(), torch.tensor([[0.], [1.], [3.]]).double(), torch.tensor([.5, .5, 0.]).double(); one = torch.ones(3, 1).double()
    for options in ({}, dict(reach=1.)):
        d = divergence(x, y, None, b, eps=.01, **options)
        for wrt in ('y', 'x', ('x', 'y'), ('y', 'a'), ('y', 'b'), ('x', 'b')): assert torch.isfinite(d.hessian(wrt)).all(), wrt
        assert torch.allclose(d.hessian('y').sum((2, 3)), d.hvp(one, 'y'), atol=1e-9)
