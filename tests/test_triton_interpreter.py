"""Every Triton kernel against the dense geometry, in Triton's interpreter on the CPU (on a GPU test_triton_gpu.py runs the same checks compiled)."""
import importlib.util, subprocess, sys
import pytest
from quick import interpreted

CHECKS = r'''
import math, warnings, torch
warnings.simplefilter("ignore")
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.dual_energy import *
from flash_sinkhorn_hessian.sinkhorn import alternate
from flash_sinkhorn_hessian.triton_geometry import TritonGeometry, triton_ready

dev = "cuda" if torch.cuda.is_available() else "cpu"
rel = lambda s, t: ((s - t).norm()/t.norm()).item()

def check(n, m, d, eps, dtype=torch.float32, batch=None, far=0., tol=5e-6, products=True):
    "All methods of the interface, with zero weights in both clouds."
    q = {k: t.to(dev) for k, t in random_problem(n, m, d, batch=batch, seed=d).items()}
    x, y, a, b = q["x"] + far, q["y"] + far, q["a"].clone(), q["b"].clone()
    if n > 2: a[..., 1] = 0
    if m > 2: b[..., m//2] = 0
    a, b = a/a.sum(-1, keepdim=True), b/b.sum(-1, keepdim=True)
    x, y = (x - x.mean(-2, keepdim=True)).to(dtype), (y - y.mean(-2, keepdim=True)).to(dtype)
    D, G = DenseGeometry(x, y, eps), TritonGeometry(x.mT.contiguous().mT, y, eps)
    v = b.log(); ref = D.lse(v); u = a.log() - ref; P = D.plan(u, v); what = f"n={n} m={m} d={d} eps={eps} {dtype} batch={batch} mode={G.scores.mode}"
    for guess in (-ref + .3, -ref - 900., None): assert (G.lse(v, guess) - ref).abs().max() < tol, what
    V = torch.randn(*b.shape, d + 1, device=dev, generator=torch.Generator(dev).manual_seed(0)).double()
    assert rel(G.apply(u, v, V), P @ V) < tol, what; assert rel(G.apply(u, v, V[..., :1]), P @ V[..., :1]) < tol, what
    if not products: return
    assert rel(G.T.apply(v, u, D.x), P.mT @ D.x) < tol, what
    A, al, be = torch.randn(*a.shape[:-1], 2, n, d, device=dev).double(), torch.randn(*a.shape[:-1], 2, n, device=dev).double(), torch.randn(*a.shape[:-1], 2, m, device=dev).double()
    W = torch.cat([D.y, torch.ones_like(D.y[..., :1])], -1); args = (u, v, A, D.y[..., None, :, :], al, be, W)
    assert rel(G.weighted(*args), D.weighted(*args)) < tol, what
    r, c = G.both_marginals(u, v); assert (r - P.sum(-1)).abs().max() <= tol*P.sum(-1).max() and rel(c, P.sum(-2)) < tol, what
    for rho in (math.inf, .5):
        p, s = Problem(G, a, b, rho, rho), Problem(D, a, b, rho, rho); f, g, e = alternate(p, 0*a, 0*b); F, H, E = alternate(s, 0*a, 0*b)
        assert (f - F).abs().max() < tol*eps*10 and (g - H).abs().max() < tol*eps*10 and (e - E).abs().max() < 1e-5*(1 + E.abs().max()), what
        f3, g3, e3 = G.iterate(p, 0*a, 0*b, 2); assert e3.shape == (2, *a.shape[:-1]) and (e3[0] - E).abs().max() < 1e-5*(1 + E.abs().max()), what
    assert torch.isfinite(G.lse(v + 1e4, ref)).all() and torch.isfinite(G.apply(u + 500, v, V)).all(), what

def all_checks():
    assert triton_ready(dev) is None
    for d in (1, 2, 3, 5, 17): check(37, 53, d, .1*d/6, products=d in (3, 17))
    check(21, 30, 64, 6.4/6); check(9, 20, 130, 13/6)
    check(37, 53, 2, 3e-4, tol=2e-5); check(20, 23, 17, 17e-3, tol=5e-5, products=False)   # small eps
    check(30, 25, 3, .05, far=1000.); check(13, 17, 3, .05, batch=3)
    for n, m in ((1, 7), (6, 1), (1, 1)): check(n, m, 3, .1, products=False)
    check(9, 12, 3, .01, torch.float64, tol=1e-11); check(5, 6, 9, .5, torch.float64, batch=2, tol=1e-11, products=False)
    x = torch.randn(40, 3, device=dev); G, H = TritonGeometry(x.bfloat16(), x.half(), .1), DenseGeometry(x.bfloat16().float(), x.half().float(), .1)
    v = torch.zeros(40, device=dev).double(); assert (G.lse(v, -H.lse(v)) - H.lse(v)).abs().max() < 5e-6
    print("all checks passed on", dev)
'''

@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton==3.6.0)")
def test_kernels_in_the_interpreter():
    r = interpreted(CHECKS + "\nall_checks()")
    assert r.returncode == 0 and "all checks passed" in r.stdout, r.stdout + r.stderr[-3000:]

def test_chained_kernels_wait_for_their_turn():
    "A kernel that may be launched before the one ahead of it has ended says so in its first line: forgotten, its results are wrong now and then. Some read first what is older than the kernel ahead; none writes before its turn."
    import ast
    from pathlib import Path
    import flash_sinkhorn_hessian as package
    turns = ("in_turn", "in_turn_ahead"); late = {"columns_kernel", "plan_kernel", "collect_kernel", "plan_ahead_kernel", "marginal_kernel", "finish_tile", "finish_kernel", "finish_both_kernel"}
    kernels = [f for m in Path(package.__file__).parent.glob("kernels_*.py") for f in ast.parse(m.read_text()).body if isinstance(f, ast.FunctionDef) and "CHAIN" in [a.arg for a in f.args.args] and f.name not in turns]
    assert len(kernels) >= 8 and late <= {f.name for f in kernels}
    for f in kernels:
        calls = [(n.lineno, ast.unparse(n.func)) for n in ast.walk(f) if isinstance(n, ast.Call)]; waits = [l for l, name in calls if name in turns or name == "finish_tile"]   # which waits
        if f.name not in late: assert ast.unparse(f.body[1]) == "in_turn(CHAIN)", f.name
        assert waits and all(l > max(waits) for l, name in calls if name.split(".")[-1] in ("store", "fetch") or "atomic" in name), f.name

def test_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None\nimport flash_sinkhorn_hessian, flash_sinkhorn_hessian.hvp, flash_sinkhorn_hessian.streaming, flash_sinkhorn_hessian.newton"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True); assert r.returncode == 0, r.stderr[-2000:]
