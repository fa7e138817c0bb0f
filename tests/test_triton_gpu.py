"""The checks of test_triton_interpreter.py with compiled kernels, and what only a GPU shows. One command on a GPU machine: `python -m pytest tests/test_triton_gpu.py`, or `python tests/test_triton_gpu.py`."""
import math, os, sys, time
try: import pytest
except ImportError: pytest = None     # run as a script on a machine without it
import torch
sys.path.insert(0, os.path.dirname(__file__))
if pytest: pytestmark = pytest.mark.cuda

def _namespace():
    from test_triton_interpreter import CHECKS
    ns = {"__name__": "checks"}; exec(CHECKS, ns)
    return ns

def test_interface():
    _namespace()["all_checks"]()

def test_sizes_and_splits():
    check = _namespace()["check"]
    for n, m, d in ((3000, 4001, 3), (4001, 3000, 64), (1500, 1700, 200), (128, 10000, 10), (10000, 128, 8)): check(n, m, d, .1*d/6)
    check(300, 257, 3, .05, batch=50); check(700, 900, 3, .01, torch.float64, tol=1e-11); check(600, 500, 1000, 100/6)

def test_products_at_one_solution_repeat_themselves():
    "Remembered maxima and recorded products must not outlive what they read: many products, other allocations in between."
    from flash_sinkhorn_hessian import divergence, solve
    gen = torch.Generator("cuda").manual_seed(0); u = lambda *s: torch.rand(*s, generator=gen, device="cuda")
    for n, d, eps in ((300, 3, .01), (4000, 3, .05), (3000, 64, .3)):
        x, y = u(n, d), u(n + 7, d); s = solve(x, y, eps=eps); v = u(n, d) - .5
        assert s.backend == "triton" and s.converged
        first = s.hvp(v); W = solve(x.double(), y.double(), eps=eps, backend="streaming").hvp(v.double())
        assert (first - W).norm() < 2e-5*W.norm()
        for k in range(8):
            torch.cuda.empty_cache() if k % 3 == 0 else u(1000*(k + 1), 100).sum().item()
            assert (s.hvp(v) - first).norm() < 1e-5*first.norm() and s.cg_info.converged
            assert (s.hvp(torch.ones_like(x)) - 2/n).abs().max() < 2e-4/n and torch.isfinite(s.hvp(u(n + 7, d) - .5, ("x", "y"))).all()
    q = [u(200, 3), u(210, 3)]; D = divergence(*q, eps=.05); v = u(5, 200, 3) - .5; R = divergence(*(t.double() for t in q), eps=.05, backend="streaming").hvp(v.double())
    for _ in range(4): assert (D.hvp(v) - R).norm() < 2e-5*R.norm()

def test_a_block_keeps_what_it_has_learnt():
    "Products in single precision put slow modes back into the residual; a block that cannot take them out again stands still and forgets all it knows."
    from flash_sinkhorn_hessian import solve
    gen = torch.Generator("cuda").manual_seed(0); u = lambda *s: torch.rand(*s, generator=gen, device="cuda")
    s, steps = solve(u(10000, 64), u(10000, 64), eps=.107), []
    for _ in range(14): s.hvp(u(16, 10000, 64) - .5, tol=1e-6); steps.append(s.cg_info.n_iter); assert s.cg_info.converged
    assert max(steps[6:]) < .6*steps[0], steps

def test_self_terms_and_bad_directions_in_recorded_products():
    "A cloud with itself takes Chebyshev's steps in one graph; a direction with NaN or inf is an error before and after products are recorded."
    from flash_sinkhorn_hessian import divergence, solve
    from flash_sinkhorn_hessian.core import random_problem
    for dtype, tol in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        q = {k: t.cuda() for k, t in random_problem(300, 410, 3, seed=1, dtype=dtype).items()}
        for kw in ({}, dict(reach=.5)):
            D = divergence(*q.values(), eps=.05, **kw); W = divergence(*(t.double().cpu() for t in q.values()), eps=.05, **kw)
            for wrt, shape in (("x", (300, 3)), (("x", "a"), (2, 300)), ("b", (410,))):
                for seed in range(4):
                    v = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)); got, want = D.hvp(v.cuda(), wrt).cpu(), W.hvp(v.double(), wrt)
                    assert got.dtype == dtype and (got - want).norm() < tol*want.norm()
                assert D.xx.cg_info is None or wrt == "b" or D.xx.cg_info.method == "chebyshev" and D.xx.cg_info.finite
            v = torch.randn(300, 3, dtype=dtype, device="cuda"); biased = [D.hvp(v, ridge=.01) for _ in range(4)]     # parts are replayed from the third on
            assert all((t - biased[0]).norm() < tol*t.norm() for t in biased)
    s, v = solve(q["x"], q["y"], eps=.05), torch.randn(300, 3, dtype=dtype, device="cuda")
    for k in range(12):
        s.hvp(v*(k + 1)); bad = v.clone(); bad[7, 1] = (math.nan, math.inf)[k % 2]
        try: s.hvp(bad)
        except ValueError as e: assert "v must be finite" in str(e)
        else: raise AssertionError("a direction that is not finite went through")

def test_recorded_loop_and_products():
    from flash_sinkhorn_hessian.dual_energy import Problem
    from flash_sinkhorn_hessian.sinkhorn import alternate
    from flash_sinkhorn_hessian.triton_geometry import TritonGeometry
    n = 2000; x, y = torch.rand(n, 3, device="cuda") - .5, torch.rand(n, 3, device="cuda") - .5; a = torch.full((n,), 1/n, device="cuda").double()
    p = Problem(TritonGeometry(x, y, .05), a, a); f = g = 0*a
    for _ in range(6): f, g, e = alternate(p, f, g)
    F, G, E = p.geom.iterate(p, 0*a, 0*a, 6); assert (f - F).abs().max() < 1e-6 and (g - G).abs().max() < 1e-6 and abs(E[-1] - e) < 1e-6
    u, v = f/.05, g/.05 + a.log(); V = torch.randn(n, 3, device="cuda").double(); first = p.geom.apply(u, v, V)
    for k in range(5): assert ((p.geom.apply(u, v, k*V) - k*first).norm() <= 1e-5*first.norm()*max(k, 1))
    u += 1.; assert (p.geom.apply(u, v, V)/math.e - first).norm() < 1e-5*first.norm()   # changed in place: no stale replay

def test_solves_of_one_shape_by_records():
    "New points of one shape again and again: the schedule, the iterations and the end are replayed, and every value and gradient is that of float64; hard, relaxed, half relaxed, a cloud against itself, batches, weights of zero, float64, a small eps, few iterations."
    import warnings
    from flash_sinkhorn_hessian import divergence, solve
    from flash_sinkhorn_hessian.core import ConvergenceWarning
    gen = torch.Generator("cuda").manual_seed(5); u = lambda *s: torch.rand(*s, generator=gen, device="cuda")
    for shape, eps, kw, dtype in (((200, 300), .05, {}, torch.float32), ((300, 300), .05, {}, torch.float32), ((200, 300), .05, dict(reach=.5), torch.float32), ((90, 40), .02, dict(reach_x=.3), torch.float32),
                                  ((200, 150), 5e-4, {}, torch.float32), ((60, 70), .05, {}, torch.float64), ((1200, 1300), .02, {}, torch.float32)):
        for B in ((), (3,)) if shape[0] < 1000 else ((),):
            for k in range(5):
                x, y = u(*B, shape[0], 3).to(dtype), u(*B, shape[1], 3).to(dtype); a = u(*B, shape[0]).to(dtype); a[..., 3*(k % 2)] = 0; a = a/a.sum(-1, keepdim=True); tol = 2e-5 if dtype == torch.float32 else 1e-9
                s, w = solve(x, y, a, eps=eps, **kw), solve(x.double(), y.double(), a.double()/a.double().sum(-1, keepdim=True), eps=eps, backend="dense", **kw); assert s.converged and w.converged, (shape, eps, kw, B, k)
                assert ((s.value - w.value).abs() <= tol*w.value.abs()).all() and (s.apply(y).double() - w.apply(y.double())).norm() <= 10*tol*w.apply(y.double()).norm()
                for q in "xy": assert (s.grad(q).double() - w.grad(q)).norm() <= 5*tol*w.grad(q).norm(), (shape, eps, kw, B, k, q, ((s.grad(q).double() - w.grad(q)).norm()/w.grad(q).norm()).item())
                if B == () and shape[0] < 1000 and len(kw) == 0: D, W = divergence(x, y, a, eps=eps), divergence(x.double(), y.double(), a.double()/a.double().sum(), eps=eps, backend="dense"); assert abs(D.value - W.value) <= 20*tol*w.value and (D.grad("x").double() - W.grad("x")).norm() <= 10*tol*w.grad("x").norm()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always"); s = solve(x, y, eps=1e-4, max_iter=30); assert not s.converged and s.n_iter <= 40 and any(issubclass(t.category, ConvergenceWarning) for t in said)

def test_first_products_from_the_record_of_their_shape():
    "From the third solution of a shape on a first product is a record: every block, several directions, batches, relaxed, divergences; the long road with a weight of zero; more steps than the record has."
    from flash_sinkhorn_hessian import divergence, solve
    def case(n, m, d, eps, wrt, k=None, dtype=torch.float32, batch=(), kind=solve, bound=2e-5, used=True, zero=False, **kw):
        for i in range(5):
            gen = torch.Generator("cuda").manual_seed(i); u = lambda *s: torch.rand(*batch, *s, generator=gen, device="cuda", dtype=torch.float64); w = {"a": u(n) + .1, "b": u(m) + .1}
            if zero: w["a"][..., 0] = 0
            q = [t.to(dtype) for t in (u(n, d), u(m, d), *(t/t.sum(-1, keepdim=True) for t in w.values()))]; S = kind(*q, eps=eps, **kw); W = kind(*(t.double() for t in q), eps=eps, backend="dense", tol=1e-10, **kw)
            v = torch.randn(*([k] if k else []), *batch, *{"x": (n, d), "y": (m, d), "a": (n,), "b": (m,)}[wrt[-1]], generator=gen, device="cuda", dtype=dtype); want = W.hvp(v.double(), wrt)
            for r in (1, 2): assert (S.hvp(r*v, wrt) - r*want).norm() < bound*r*want.norm(), (n, m, d, wrt, k, i, r)
            had = [h[0] for s in ([S] if kind is solve else [S.xy, S.xx, S.yy]) for h in s.__dict__.get("_firsts", {}).values()]; assert i < 2 or had and set(had) == {2 if used else 0}, (n, m, d, wrt, k, i, had)
    for wrt in ("x", "y", ("x", "y"), ("x", "b")): case(500, 400, 3, .05, wrt)
    case(400, 500, 3, .05, "a"); case(500, 400, 3, .05, "x", 5); case(500, 400, 3, .05, "x", 20); case(300, 200, 3, .05, "x", 2, batch=(3,)); case(700, 600, 16, .3, "x")
    case(300, 400, 3, .05, "x", dtype=torch.float64, bound=1e-8); case(1000, 1100, 3, .01, "x", bound=2e-4)      # more than sixteen steps
    case(500, 400, 3, .05, "x", reach=.5); case(500, 400, 3, .05, "a", reach_x=.5); case(500, 400, 3, .05, "x", zero=True, used=False); case(300, 400, 3, .05, "x", 3, dtype=torch.float64, bound=1e-8, used=False)
    for wrt, k in (("x", None), ("a", None), ("x", 3)): case(500, 400, 3, .05, wrt, k, kind=divergence, bound=1e-4)
    x, y = (torch.rand(500, 3, device="cuda") for _ in range(2)); S = solve(x, y, eps=.05); v = torch.randn_like(x); v[0, 0] = math.nan
    try: S.hvp(v); assert False
    except ValueError as e: assert "v must be finite" in str(e)

def test_products_that_look_ahead():
    "Sixty-four columns at a known maximum, on a Hopper card in flight beside the powers of two: every form of the scores, odd sizes, weights of zero, batches, rows of any magnitude."
    from flash_sinkhorn_hessian.dual_energy import DenseGeometry
    from flash_sinkhorn_hessian.kernels_plan import looks_ahead, plan_product
    from flash_sinkhorn_hessian.kernels_softmin import column_bias, prepare
    gen = torch.Generator("cuda").manual_seed(7); u = lambda *s: torch.rand(*s, generator=gen, device="cuda"); ahead = 0
    for n, m, d, B in ((1, 1, 3, 1), (70, 200, 1, 2), (129, 257, 2, 1), (500, 300, 3, 3), (333, 1000, 4, 1), (640, 128, 5, 1), (100, 900, 8, 2), (300, 400, 10, 1), (257, 511, 16, 1), (200, 300, 17, 2), (400, 129, 32, 1), (150, 1500, 64, 1), (90, 260, 100, 1)):
        x, y = u(B, n, d), u(B, m, d); x, y = x - x.mean(-2, True), y - y.mean(-2, True); eps = .1*d/6; b = u(B, m).double()
        if m > 1: b[:, m//2] = 0
        s = prepare(x, y, eps, [t.norm(dim=-1).max().item() for t in (x, y)]); v = (b/b.sum(-1, True)).log(); D = DenseGeometry(x.double(), y.double(), eps); r = -D.lse(v); bias = column_bias(s, v); ahead += looks_ahead(s, x.device)
        for q in (64, 65, 49, 130):
            V = torch.randn(B, m, q, generator=gen, device="cuda").double()*torch.logspace(-6, 6, q, device="cuda").double(); keep = []; plan_product(s, r, bias, V, keep=keep); want = D.plan(r, v) @ V; unit = want.abs().amax((0, 1))
            for shift in (0, 0, 300): assert (((plan_product(s, r + shift, bias, V, known=keep[0])[:, 0]/math.exp(shift) - want)/unit).norm()/(want/unit).norm()) < 3e-6, (n, m, d, q, shift)
    from flash_sinkhorn_hessian import kernels_plan
    assert ahead == (12 if kernels_plan.gluon and torch.cuda.get_device_capability()[0] == 9 else 0)

def test_sparse_products_of_many_columns():
    "Rows of no, few and many entries, columns in blocks and what is left of them, scores at the entries and sums over the transpose: against float64; then sixteen, ten and single directions of a solved problem."
    import flash_sinkhorn_hessian.kernels_truncated as kt, flash_sinkhorn_hessian.truncated as tr
    from flash_sinkhorn_hessian import solve
    gen = torch.Generator("cuda").manual_seed(3); randn = lambda *s: torch.randn(*s, generator=gen, device="cuda").double()
    n, m = 301, 2003; M = torch.rand(n, m, generator=gen, device="cuda")*(torch.rand(n, m, generator=gen, device="cuda") < torch.linspace(-.2, 1, n, device="cuda")[:, None]**3)
    i, j = M.nonzero(as_tuple=True); S = kt.TritonSparse(torch.cat([j[:1]*0, torch.bincount(i, minlength=n).cumsum(0)]).int(), j.int(), M[i, j], m); M = M.double(); h, w = randn(m), randn(n)
    for k in (1, 2, 3, 5, 16, 20, 64, 65, 100, 1040):
        V = randn(m, k); size = (w[:, None]*M*h).abs() @ V.abs(); p, gate = randn(n, k), torch.ones(1, dtype=torch.int32, device="cuda")
        assert ((S.times(V, before=h, scale=w) - (w[:, None]*M*h) @ V).abs() <= 1e-6*size).all() and torch.allclose(S @ V, M @ V, atol=1e-10), k
        assert ((S.times(V.float(), torch.empty_like(p), w, p=p, gate=gate) - p + w[:, None]*(M @ V)).abs() <= 1e-6*((w[:, None]*M).abs() @ V.abs() + p.abs())).all(), k
    for k, e in ((16, 64), (40, 48), (9, 17)):
        A, B, t = randn(m, e).float(), randn(k, n, e), randn(n, k); want = h[:, None]*torch.einsum("ij,ijh->jh", w[:, None]*M, t[:, None] - torch.einsum("je,hie->ijh", A.double(), B))
        assert (S.scored(A, B, t, w, h) - want).norm() < 1e-6*want.norm()
        A, B, al, be = randn(k, n, e), randn(1, m, e).float().double(), randn(k, n), randn(k, m)
        for V in (randn(m, e + 1), h.float().double()[:, None]*torch.cat([B[0]/2, torch.ones_like(B[0, :, :1])], 1)):
            want = (M*(A @ B.mT + al[..., None] + be[:, None])) @ V; assert (S.weighted(A, B, al, be, V) - want).norm() < 2e-6*want.norm()
    share = kt.SHARE, tr.SHARE; kt.SHARE = tr.SHARE = 1                   # these are not sparse
    try:
        for d, eps in ((64, .2), (3, .005)):
            x, y = (torch.rand(600, d, generator=gen, device="cuda") for _ in range(2)); s, D = solve(x.mT.contiguous().mT, y.mT.contiguous().mT, eps=eps, tol=1e-6), solve(x.double(), y.double(), eps=eps, tol=1e-9, backend="dense")
            assert isinstance(s._second.p.geom, tr.TruncatedGeometry)
            for _ in range(8): s.hvp(torch.randn(16, 600, generator=gen, device="cuda"), ("x", "a"))     # steps are known before the points have moved once
            for k in (16, 10, 1):
                v = torch.randn(k, 600, d, generator=gen, device="cuda"); want = D.hvp(v.double(), tol=1e-11)
                for _ in range(8): assert (s.hvp(v, tol=1e-8) - want).norm() < 2e-5*want.norm(), (d, k)
    finally: kt.SHARE, tr.SHARE = share

def test_a_script_may_end_while_kernels_compile():
    import subprocess, tempfile
    code = "import torch, flash_sinkhorn_hessian as f; x = torch.rand(3000, 3, device='cuda'); print(f.solve(x, x + .1, eps=.05).value.item())"
    with tempfile.TemporaryDirectory() as cache:
        r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_CACHE_DIR": cache}, timeout=200)
    assert r.returncode == 0 and "terminate" not in r.stderr, (r.returncode, r.stderr[-1500:])

def test_a_new_size_compiles_nothing():
    from flash_sinkhorn_hessian.triton_geometry import TritonGeometry
    def run(n):
        x = torch.rand(n, 3, device="cuda") - .5; v = torch.zeros(n, device="cuda").double(); G = TritonGeometry(x, x, .05); t = time.time()
        l = G.lse(v, v); G.apply(-l, v, torch.ones(n, 4, device="cuda").double()); torch.cuda.synchronize(); return time.time() - t
    run(3000); assert max(run(3001), run(3537), run(5000)) < .1

if __name__ == "__main__":
    for test in (test_interface, test_sparse_products_of_many_columns, test_sizes_and_splits, test_products_at_one_solution_repeat_themselves, test_a_block_keeps_what_it_has_learnt, test_self_terms_and_bad_directions_in_recorded_products, test_recorded_loop_and_products, test_products_that_look_ahead, test_a_script_may_end_while_kernels_compile, test_a_new_size_compiles_nothing): test(); print("passed", test.__name__)
