"Sparse products of sixteen columns: variants on the real patterns; then the pieces of a step."
import os, sys, time, math, statistics, traceback, torch
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
T0 = time.time()
from flash_sinkhorn_hessian import solve, krylov
from flash_sinkhorn_hessian.kernels_softmin import launch
import flash_sinkhorn_hessian.kernels_truncated as kt, flash_sinkhorn_hessian
import triton.language as tl, gpu_kernels as gk
print(flash_sinkhorn_hessian.__file__, torch.cuda.get_device_name(), torch.__version__)
dev = "cuda"
def clock(fn, reps=20, rounds=9):
    fn(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(reps): fn()
    ts = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b)*1e3/reps)
    return statistics.median(ts[2:])
class Csr: pass
def csr(crow, col, val, width):
    S = Csr(); S.crow, S.col, S.val, S.width, S.n = crow, col, val, width, len(crow) - 1; return S
def padded(S, to=8):
    "Rows of a multiple of eight entries, the last ones zero."
    size = S.crow.diff(); big = (size + to - 1)//to*to; crow = torch.cat([S.crow[:1]*0, big.cumsum(0).int()]); row = torch.repeat_interleave(torch.arange(S.n, device=dev), size.long())
    at = crow[row].long() + torch.arange(len(S.col), device=dev) - S.crow[row].long(); tot = int(crow[-1])
    col, val = torch.zeros(tot, dtype=S.col.dtype, device=dev), torch.zeros(tot, dtype=S.val.dtype, device=dev)
    last = torch.repeat_interleave(S.col[(S.crow[1:] - 1).long()], big.long()); col[:] = last; col[at], val[at] = S.col, S.val
    return csr(crow, col, val, S.width)
def permuted(S, rows, cols):
    "Rows and columns renumbered: rows[i] is the old row that becomes i."
    size = S.crow.diff()[rows]; inv = torch.empty_like(cols); inv[cols] = torch.arange(len(cols), device=dev)
    row = torch.repeat_interleave(torch.arange(S.n, device=dev), size.long()); crow = torch.cat([S.crow[:1]*0, size.cumsum(0).int()])
    at = S.crow[rows][row].long() + torch.arange(len(row), device=dev) - crow[row].long(); col, val = inv[S.col[at].long() & 0xFFFF], S.val[at]
    o = (row*S.width + col).argsort(); return csr(crow, col[o].short(), val[o], S.width)
def morton(x):
    q = ((x - x.amin(0))/(x.amax(0) - x.amin(0))*1023).long(); code = torch.zeros(len(x), dtype=torch.long, device=dev)
    for b in range(10):
        for k in range(3): code |= ((q[:, k] >> b) & 1) << (3*b + k)
    return code.argsort()
table = []
def variants(name, S, V, x=None):
    n, k = S.n, V.shape[1]; w = torch.rand(n, device=dev).double(); p = torch.randn(n, k, device=dev).double(); e = torch.randn(n, device=dev).double(); gate = torch.ones(1, dtype=torch.int32, device=dev)
    out, dots, nxt = torch.empty(n, k, device=dev).double(), torch.zeros(20000, 2, k, device=dev).double(), torch.empty(n, k, device=dev)
    A = torch.sparse_csr_tensor(S.crow.long(), S.col.long() & 0xFFFF, S.val.double(), (n, S.width)); ref = p - w[:, None]*(A @ V.double())
    sparse = kt.TritonSparse(S.crow, S.col.int() & 0xFFFF, S.val, S.width)
    def report(what, fn, want=ref, extra=""):
        try:
            out.zero_(); dots.zero_(); fn(); err = ((out - want).norm()/(p - want).norm()).item(); ed = ((dots.sum(0)[0] - (p*out).sum(0)).abs().max()/(p*out).sum(0).abs().max()).item()
            t = clock(fn); table.append(f"{name:14s} {what:44s} {t:7.1f} us  err {err:.1e} dots {ed:.0e} {extra}"); print(table[-1], flush=True)
        except Exception as ex: print(name, what, "FAILED", repr(ex)[:300], flush=True)
    for cfg in (None, (1, 64, 1, 2048), (1, 64, 1, 16384), (1, 32, 1, 16384)) + (((1, 128, 1, 4096),) if k == 1 else ()):
        if k == 1 and cfg and cfg[1] == 32: continue
        report(f"triton R,NE,W,most {cfg}", lambda: sparse.times(V, out, w, p=p, e=e, dots=dots, gate=gate, cfg=cfg))
    if k == 1: return
    P8 = padded(S); half = V.half(); href = p - w[:, None]*(A @ half.double())
    def rows(S, W, NE, VE, most, al, cyc=False, order=None, V=V, VC=4):
        tiles = -(-n//W); per = -(-tiles//most); tiles = -(-tiles//per)
        return lambda: launch(gk.rows_kernel, (tiles,), S.crow, S.col, S.val, V, w, p, e, out, nxt, dots, gate, gate if order is None else order, n, tiles, per, 0, warps=W, W=W, KV=k, NE=NE, VE=VE, VC=VC, SCALE=True, SUB=True, NEXT=False, DOTS=True, GATE=True, SHORT=True, ALIGNED=al, CYCLIC=cyc, ORDER=order is not None, DT=V.dtype == torch.float16, CHAIN=True)
    for W, NE, VE, most in ((1, 64, 1, 16384), (1, 32, 1, 16384), (1, 64, 1, 2112)): report(f"gluon W{W} NE{NE} VE{VE} most {most}", rows(S, W, NE, VE, most, False))
    for W, NE, VE, most in ((1, 64, 8, 16384), (1, 64, 4, 16384), (1, 32, 4, 16384), (4, 64, 4, 16384), (4, 32, 4, 16384), (8, 32, 4, 16384), (4, 64, 4, 528), (4, 32, 4, 924), (8, 32, 4, 396)): report(f"gluon padded W{W} NE{NE} VE{VE} most {most}", rows(P8, W, NE, VE, most, True))
    report("gluon padded W4 NE32 VE4 528 cyclic", rows(P8, 4, 32, 4, 528, True, True))
    report("gluon padded half W1 NE64 VE4", rows(P8, 1, 64, 4, 16384, True, V=half, VC=8), href); report("gluon padded half W4 NE64 VE4", rows(P8, 4, 64, 4, 16384, True, V=half, VC=8), href)
    longest = P8.crow.diff().argsort(descending=True).int(); report("gluon padded W4 NE32 VE4 longest first", rows(P8, 4, 32, 4, 16384, True, order=longest))
    Z = csr(P8.crow, P8.col*0, P8.val, S.width); zref = p - w[:, None]*(torch.zeros(n, device=dev).double().index_add_(0, torch.repeat_interleave(torch.arange(n, device=dev), S.crow.diff().long()), S.val.double())[:, None]*V[:1].double())
    for W, NE in ((1, 64), (4, 32)): report(f"gluon padded W{W} NE{NE} VE4, all at column 0", rows(Z, W, NE, 4, 16384, True), zref)
    if x is not None:
        o = morton(x[0]); oi = o.int(); o2 = morton(x[1])
        for W, NE, most in ((1, 64, 16384), (4, 64, 16384), (4, 32, 16384), (8, 32, 16384), (8, 64, 16384), (16, 32, 16384), (8, 32, 396), (4, 64, 528)): report(f"padded W{W} NE{NE} VE4 most {most} rows in order", rows(P8, W, NE, 4, most, True, order=oi))
        M = padded(permuted(S, o, o2)); V2 = V[o2].contiguous(); Am = torch.sparse_csr_tensor(M.crow.long(), M.col.long() & 0xFFFF, M.val.double(), (n, S.width)); mref = p - w[:, None]*(Am @ V2.double())
        for W, NE, most in ((1, 64, 16384), (4, 64, 16384), (8, 32, 16384), (8, 32, 396)): report(f"padded W{W} NE{NE} VE4 most {most} all in order", rows(M, W, NE, 4, most, True, V=V2), mref)
        Sm = permuted(S, o, o2); sm = kt.TritonSparse(Sm.crow, Sm.col.int() & 0xFFFF, Sm.val, S.width); report("triton as is, all in order", lambda: sm.times(V2, out, w, p=p, e=e, dots=dots, gate=gate), mref)
def steps(name, cg, rhs):
    goal = torch.full((1,), 1e-60, dtype=torch.float64, device=dev)
    def of(count):
        def run():
            cg._start(rhs, goal)
            for t in range(count): cg._step(t % 2)
        return clock(run, 1, 9)
    def step(): return (of(24) - of(8))/16
    real, res = krylov.launch, {}
    full = step()
    for gone in ("residual_kernel", "shares_kernel", "direction_kernel", "spmm_kernel"):
        def some(kernel, *a, **kw):
            if kernel.__name__ != gone: real(kernel, *a, **kw)
        krylov.launch = kt.launch = some
        try: res[gone] = full - step()
        finally: krylov.launch = kt.launch = real
    P = cg.prod.P
    for fewer in (396, 132):
        cg.prod.P = fewer; res[f"P {P} -> {fewer}"] = full - step(); cg.prod.P = P
    return f"{name:14s} step {full:.1f} us; without, less by: " + ", ".join(f"{k} {v:.1f}" for k, v in res.items())
for d, eps in ((64, .107), (3, .005)):
    g = torch.Generator(dev).manual_seed(10000 + d); x, y = (torch.rand(10000, d, device=dev, generator=g) for _ in range(2)); s = solve(x, y, eps=eps); print(f"d={d} solved {time.time() - T0:.1f} s", flush=True)
    for i in range(8): s.hvp(torch.randn(10000, d, device=dev, generator=g), tol=1e-6)
    for i in range(2): s.hvp(torch.randn(16, 10000, d, device=dev, generator=g), tol=1e-6)
    print(f"hvps {time.time() - T0:.1f} s", flush=True); K = s._second.p.geom.kernel; S = csr(K.crow, K.col, K.val, K.width); size = S.crow.diff(); cnt = torch.bincount(S.col.long() & 0xFFFF, minlength=10000)
    print("entries a row: mean", size.double().mean().item(), "min", size.min().item(), "max", size.max().item(), "std", size.double().std().item(), "a column: max", cnt.max().item(), "std", cnt.double().std().item(), flush=True)
    variants(f"d={d} k=16", S, torch.randn(10000, 16, device=dev, generator=g), (x, y) if d == 3 else None); variants(f"d={d} k=1", S, torch.randn(10000, 1, device=dev, generator=g).double())
    print(f"{time.time() - T0:.1f} s", flush=True)
    sys_ = s._system
    for k in (16, 1):
        try:
            who = sys_ if "_device_cg" in sys_.__dict__ else sys_.T; cg = who._device_cg[k]; rhs = who.T.project(torch.randn(10000, k, device=dev, generator=g).double())[None].contiguous()
            table.append(steps(f"d={d} k={k}", cg, rhs)); print(table[-1], flush=True)
            if k == 16:
                old = krylov.slices
                for size_ in (64, 32):
                    try:
                        krylov.slices = lambda m, k=1: (-(-m//size_), 1, size_)
                        c2 = krylov.DeviceCG(who, 16); c2._adopt(); table.append(steps(f"d={d} k=16 slices of {size_}", c2, rhs)); print(table[-1], flush=True)
                    except Exception as ex: print("slices", size_, repr(ex)[:300])
                    finally: krylov.slices = old
        except Exception: traceback.print_exc()
print("=" * 20, f"{time.time() - T0:.1f} s"); print("\n".join(table))
