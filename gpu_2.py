"Sparse products of sixteen columns: second round."
import os, sys, time, math, statistics, traceback, torch
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
T0 = time.time()
from flash_sinkhorn_hessian import solve, krylov
from flash_sinkhorn_hessian.kernels_softmin import launch
import flash_sinkhorn_hessian.kernels_truncated as kt, flash_sinkhorn_hessian
import triton.language as tl, gpu_kernels as gk, gpu_triton as gt, gpu_weighted as gw
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
    sparse = kt.TritonSparse(S.crow, S.col.int() & 0xFFFF, S.val, S.width); P8 = padded(S)
    def report(what, fn, want=ref):
        try:
            out.zero_(); fn(); err = ((out - want).norm()/(p - want).norm()).item(); t = clock(fn); table.append(f"{name:14s} {what:44s} {t:7.1f} us  err {err:.1e}"); print(table[-1], flush=True)
        except Exception as ex: print(name, what, "FAILED", repr(ex)[:300], flush=True)
    report("as it is", lambda: sparse.times(V, out, w, p=p, e=e, dots=dots, gate=gate))
    def flow(NE, EARLY, PRE, PAD, NS=1, S=P8, V=V, warps=1):
        return lambda: launch(gt.flow_kernel, (n,), S.crow, S.col, S.val, V, w, p, e, out, nxt, dots, gate, n, k, 0, warps=warps, KV=k, NE=NE, NS=NS, EARLY=EARLY, PRE=PRE, PAD=PAD, SCALE=True, SUB=True, NEXT=False, DOTS=False, GATE=True, SHORT=True, F=tl.float64 if k == 1 else tl.float32, CHAIN=True)
    def row(NE, VE, EARLY, DEEP, S=P8, V=V, regs=None): return lambda: launch(gk.row_kernel, (n,), S.crow, S.col, S.val, V, w, p, e, out, nxt, dots, gate, n, warps=1, regs=regs, KV=k, NE=NE, VE=VE, EARLY=EARLY, DEEP=DEEP, SUB=True, NEXT=False, DOTS=False, GATE=True, CHAIN=True)
    if k > 1:
        for c in ((64, True, 0, True), (64, True, 1, True), (64, True, 2, True), (64, False, 1, True), (32, True, 1, True), (32, True, 2, True), (128, True, 1, True), (128, True, 0, True)): report(f"flow NE,EARLY,PRE,PAD {c}", flow(*c))
        for c in ((64, True, 1, False), (32, True, 1, False), (32, True, 2, False)): report(f"flow NE,EARLY,PRE,PAD {c}", flow(*c, S=S))
        for NS in (2, 3): report(f"flow 64 EARLY PAD stages {NS}", flow(64, True, 0, True, NS))
        for c in ((64, 8, True, False), (64, 8, False, False), (64, 8, True, True), (128, 8, True, False), (32, 4, True, True), (64, 4, True, True)): report(f"gluon NE,VE,EARLY,DEEP {c}", row(*c))
    else:
        for c in ((128, False, 0, True), (128, False, 1, True), (128, False, 2, True), (256, False, 1, True), (256, False, 0, True), (64, False, 2, True)): report(f"flow NE,EARLY,PRE,PAD {c}", flow(*c))
        report("flow 128 PRE 1 unpadded", flow(128, False, 1, False, S=S)); report("flow 256 PRE 1, two warps", flow(256, False, 1, True, warps=2))
    if x is not None:
        o, o2 = morton(x[0]), morton(x[1]); M = padded(permuted(S, o, o2)); V2 = V[o2].contiguous(); Am = torch.sparse_csr_tensor(M.crow.long(), M.col.long() & 0xFFFF, M.val.double(), (n, S.width)); mref = p - w[:, None]*(Am @ V2.double())
        if k > 1:
            report("flow 64 True 1, all in order", flow(64, True, 1, True, S=M, V=V2), mref); report("gluon 64 8 True False, all in order", row(64, 8, True, False, S=M, V=V2), mref)
        else: report("flow 128 False 1, all in order", flow(128, False, 1, True, S=M, V=V2), mref)
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
    for gone in ("residual_kernel", "shares_kernel", "direction_kernel", "spmm_kernel", "dots_kernel", "flow_kernel"):
        def some(kernel, *a, **kw):
            if kernel.__name__ != gone: real(kernel, *a, **kw)
        krylov.launch = kt.launch = some
        try: res[gone] = full - step()
        finally: krylov.launch = kt.launch = real
    return f"{name:14s} step {full:.1f} us; without, less by: " + ", ".join(f"{k} {v:.1f}" for k, v in res.items())

def weighted(S, g):
    n, k, e = S.n, 16, 64; A = torch.randn(k, n, e, device=dev, generator=g); B = torch.rand(1, n, e, device=dev, generator=g); alpha, beta = torch.randn(k, n, device=dev, generator=g).double(), torch.randn(k, n, device=dev, generator=g).double(); h = torch.rand(n, device=dev, generator=g) + .5; w = torch.rand(n, device=dev, generator=g).double()
    V = torch.cat([h[:, None]*B[0], h[:, None]], 1).double(); ref = kt.TritonSparse(S.crow, S.col.int() & 0xFFFF, S.val, S.width); al, be = alpha.mT.contiguous(), beta.mT.float().contiguous(); Vh, tail = V[:, :e].float().contiguous(), h.contiguous(); out = torch.empty(k, n, e + 1, device=dev).double()
    row = torch.repeat_interleave(torch.arange(n, device=dev), S.crow.diff().long()); col = S.col.long() & 0xFFFF
    s0 = ((A[0].double()[row]*B[0].double()[col]).sum(1) + alpha[0][row] + beta[0].float().double()[col])*S.val.double(); want = w[:, None]*torch.zeros(n, e + 1, device=dev).double().index_add_(0, row, s0[:, None]*torch.cat([h.double()[:, None]*B[0].double(), h.double()[:, None]], 1)[col])
    def report(what, fn):
        try:
            o = fn(); err = ((o[0] - want).norm()/want.norm()).item(); t = clock(fn, 4); table.append(f"weighted {what:44s} {t:7.1f} us  err {err:.1e}"); print(table[-1], flush=True)
        except Exception as ex: print("weighted", what, "FAILED", repr(ex)[:300], flush=True)
    report("as it is", lambda: ref.weighted(A, B, alpha, beta, V, scale=w))
    def one(NE, W, prec, same, PREC=tl):
        def run():
            launch(gw.weighted_kernel, (n, 1, 1), S.crow, S.col, S.val, A, B, al, be, Vh, tail, w, out, n, n, k, 1, k, e, e, warps=W, KD=16, KE=64, KQ=64, FE=True, FQ=True, LAST=1, SCALE=True, NE=NE, SHORT=True, F=tl.float32, PREC=prec, SAME=same, FK=True); return out
        return run
    for c in ((64, 2, "ieee", False), (64, 4, "ieee", False), (32, 4, "ieee", False), (32, 4, "ieee", True), (64, 2, "tf32x3", False), (64, 4, "tf32x3", False), (32, 2, "tf32x3", False), (64, 4, "tf32x3", True), (32, 2, "tf32x3", True), (64, 2, "tf32x3", True), (128, 4, "tf32x3", True), (32, 4, "tf32x3", True), (16, 1, "tf32x3", True)): report(f"NE,W,precision,same {c}", one(*c))
def wide(S, g):
    n = S.n; P8 = padded(S); sparse = kt.TritonSparse(S.crow, S.col.int() & 0xFFFF, S.val, S.width); h, w = torch.rand(n, device=dev).double(), torch.rand(n, device=dev).double(); gate = torch.ones(1, dtype=torch.int32, device=dev)
    for k in (64, 65, 1040):
        V = torch.randn(n, k, device=dev, generator=g).double(); table.append(f"times of {k} columns between diagonals, as it is {clock(lambda: sparse.times(V, before=h, scale=w), 4):.1f} us"); print(table[-1], flush=True)
    V = torch.randn(n, 64, device=dev, generator=g); out = torch.empty(n, 64, device=dev).double(); want = w[:, None]*(torch.sparse_csr_tensor(S.crow.long(), S.col.long() & 0xFFFF, S.val.double(), (n, S.width)) @ V.double())
    for NE, EARLY, PRE, W in ((16, True, 1, 1), (32, True, 1, 1), (16, False, 1, 1), (8, True, 2, 1), (16, True, 2, 1), (32, True, 1, 2), (32, True, 0, 2), (64, True, 1, 2)):
        try:
            fn = lambda: launch(gt.flow_kernel, (n,), P8.crow, P8.col, P8.val, V, w, out, out, out, V, out, gate, n, 64, 0, warps=W, KV=64, NE=NE, NS=1, EARLY=EARLY, PRE=PRE, PAD=True, SCALE=True, SUB=False, NEXT=False, DOTS=False, GATE=True, SHORT=True, F=tl.float32, CHAIN=True)
            out.zero_(); fn(); err = ((out - want).norm()/want.norm()).item(); table.append(f"64 columns, flow NE,EARLY,PRE,W {NE, EARLY, PRE, W} {clock(fn, 8):.1f} us err {err:.1e}"); print(table[-1], flush=True)
        except Exception as ex: print("wide", NE, W, repr(ex)[:300], flush=True)
def apart(self, p, u, q, e, dots, gate):
    "Products with the dots on their own."
    if self.kernel is None: self.K.times(self.next, u, self.r, next=self.mid, gate=gate); self.KT.times(self.mid, q, self.c, p=p, gate=gate)
    else: self.kernel(self.pads[0], self.next, u, self.r, self.mid, None, gate); self.kernel(self.pads[1], self.mid, q, self.c, None, p, gate)
    P, per, size = krylov.slices(self.stride, q.shape[-1]); k = q.shape[-1]
    launch(krylov.dots_kernel, (P, 1, 1), p, q, e, dots, self.stride, k, per, warps=WD, KC=1 if k == 1 else 16, FULL=True, BLOCK=size, CHAIN=True)
WD = 4
def flowing(NE, EARLY, PRE):
    def go(S, V, out, scale, nxt, p, gate):
        n, k = S.n, V.shape[1]
        krylov.launch(gt.flow_kernel, (n,), S.crow, S.col, S.val, V, scale, out if p is None else p, out, out, V if nxt is None else nxt, out, gate, n, k, 0, warps=1, KV=k, NE=NE, NS=1, EARLY=EARLY, PRE=PRE, PAD=True, SCALE=True, SUB=p is not None, NEXT=nxt is not None, DOTS=False, GATE=True, SHORT=True, F=tl.float64 if k == 1 else tl.float32, CHAIN=True)
    return go
for d, eps in ((64, .107), (3, .005)):
    g = torch.Generator(dev).manual_seed(10000 + d); x, y = (torch.rand(10000, d, device=dev, generator=g) for _ in range(2)); s = solve(x, y, eps=eps); print(f"d={d} solved {time.time() - T0:.1f} s", flush=True)
    for i in range(8): s.hvp(torch.randn(10000, d, device=dev, generator=g), tol=1e-6)
    for i in range(2): s.hvp(torch.randn(16, 10000, d, device=dev, generator=g), tol=1e-6)
    print(f"hvps {time.time() - T0:.1f} s", flush=True); K = s._second.p.geom.kernel; S = csr(K.crow, K.col, K.val, K.width)
    variants(f"d={d} k=16", S, torch.randn(10000, 16, device=dev, generator=g), (x, y) if d == 3 else None); variants(f"d={d} k=1", S, torch.randn(10000, 1, device=dev, generator=g).double(), (x, y) if d == 3 else None)
    print(f"{time.time() - T0:.1f} s", flush=True)
    if d == 64:
        try: wide(S, g); weighted(S, g)
        except Exception: traceback.print_exc()
    sys_ = s._system; who = sys_ if "_device_cg" in sys_.__dict__ else sys_.T
    for k in (16, 1):
        try:
            cg = who._device_cg[k]; rhs = who.T.project(torch.randn(10000, k, device=dev, generator=g).double())[None].contiguous()
            table.append(steps(f"d={d} k={k}", cg, rhs)); print(table[-1], flush=True)
            class Apart(krylov.SparseProducts): __call__ = apart
            cg.prod.__class__ = Apart; cg.prod.P = krylov.slices(10000, k)[0]; cg.prod.pads = [padded(csr(t.crow, t.col, t.val, t.width)) for t in (cg.prod.K, cg.prod.KT)]
            for what, kernel in ((f"apart", None), *((f"apart, flow {c}", flowing(*c)) for c in (((64, True, 1), (64, True, 2), (32, True, 1)) if k > 1 else ((128, False, 1), (128, False, 2), (256, False, 1))))):
                cg.prod.kernel = kernel; table.append(steps(f"d={d} k={k} {what}", cg, rhs)); print(table[-1], flush=True)
        except Exception: traceback.print_exc()
print("=" * 20, f"{time.time() - T0:.1f} s"); print("\n".join(table))
