"hvp with one and sixteen directions: right, and how long; graph alone; its kernels; a step of conjugate gradients with other slices."
import os, sys, time, statistics, traceback, collections, torch
T0 = time.time()
from flash_sinkhorn_hessian import solve, krylov
import flash_sinkhorn_hessian.kernels_truncated as kt, flash_sinkhorn_hessian.truncated as tr, flash_sinkhorn_hessian
print(flash_sinkhorn_hessian.__file__, torch.cuda.get_device_name(), torch.__version__)
dev, table = "cuda", []
def say(t): table.append(t); print(t, flush=True)
def events(fn, rounds=25):
    ts = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(); a.record(); fn(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    return statistics.median(ts)
def right():
    "Small: truncated in float32 against dense float64."
    old = kt.SHARE; kt.SHARE = tr.SHARE = 1
    try:
        for d, eps, k in ((64, .2, 16), (3, .005, 16)):
            g = torch.Generator(dev).manual_seed(d); x, y = (torch.rand(600, d, device=dev, generator=g) for _ in range(2)); v = torch.randn(k, 600, d, device=dev, generator=g)
            s, D = solve(x, y, eps=eps, tol=1e-6), solve(x.double(), y.double(), eps=eps, tol=1e-9, backend="dense")
            h, ref = s.hvp(v, tol=1e-8), D.hvp(v.double(), tol=1e-11); say(f"right? d={d} eps={eps} k={k} {type(s._second.p.geom).__name__}: relative {((h - ref).norm()/ref.norm()).item():.1e}")
    finally: kt.SHARE = tr.SHARE = old
try: right()
except Exception: traceback.print_exc()
def steps(name, who, k, g):
    rhs = who.T.project(torch.randn(10000, k, device=dev, generator=g).double())[None].contiguous(); goal = torch.full((1,), 1e-60, dtype=torch.float64, device=dev)
    def one(what, cg):
        def of(count):
            def run():
                cg._start(rhs, goal)
                for t in range(count): cg._step(t % 2)
            run(); torch.cuda.synchronize(); G = torch.cuda.CUDAGraph()
            with torch.cuda.graph(G): run()
            return events(G.replay, 9)
        say(f"{name} k={k} {what}: a step {(of(24) - of(8))/16*1e3:.1f} us")
    one("as it is", who._device_cg[k])
    if k == 1: return
    slices, grid = krylov.slices, krylov.DeviceCG._grid
    for size, W in ((64, 4), (128, 8), (64, 16)):
        try:
            krylov.slices = lambda m, k=1, z=None: slices(m, k, z or size); krylov.DeviceCG._grid = lambda self: (grid(self)[0], dict(grid(self)[1], warps=W))
            c = krylov.DeviceCG(who, k); c._adopt(); one(f"slices of {size}, {W} warps", c)
        except Exception as e: print(size, W, repr(e)[:200])
        finally: krylov.slices, krylov.DeviceCG._grid = slices, grid
def replayed(fn):
    fn(); torch.cuda.synchronize(); G = torch.cuda.CUDAGraph()
    with torch.cuda.graph(G): fn()
    return events(G.replay, 9)*1e3
def right_hand_sides(s, v, d, g):
    G = s._second.p.geom.T; B, t = v.double(), torch.randn(10000, 16, device=dev, generator=g).double(); m = s._second.T; V = torch.cat([B.movedim(-3, -2), t[..., None]], -1).flatten(-2)
    say(f"    right-hand side, scores {replayed(lambda: G.scored(m.u, m.wide_v, B, t)):.1f} us, product of 1040 columns {replayed(lambda: G.apply(m.u, m.wide_v, V)):.1f} us, of 65 {replayed(lambda: G.apply(m.u, m.wide_v, V[:, :65])):.1f} us")
    a, V = G.scored(m.u, m.wide_v, B, t), G.apply(m.u, m.wide_v, V).unflatten(-1, (16, 65)); b = V[..., -1] - (G.x.double()[:, None]*V[..., :-1]).sum(-1); say(f"    the two differ by {((a - b).norm()/b.norm()).item():.1e}")
    S = torch.randn(len(G.T.kernel.val), 16, device=dev); say(f"    of which the sums {replayed(lambda: G.T.kernel.crossed.times(S, scale=G.rows(m.u))):.1f} us")
def case(d, eps):
    g = torch.Generator(dev).manual_seed(10000 + d); x, y = (torch.rand(10000, d, device=dev, generator=g) for _ in range(2)); s = solve(x, y, eps=eps); ms = {}
    for k in (0, 16):
        dirs = [torch.randn(*((k,) if k else ()), 10000, d, device=dev, generator=g) for _ in range(24)]
        for v in dirs[:14]: out = s.hvp(v, tol=1e-6)
        if k:
            one = torch.stack([s.hvp(t, tol=1e-6) for t in v[:3]]); say(f"d={d} eps={eps}: sixteen against singles {((out[:3] - one).norm()/one.norm()).item():.1e}")
        ts = []
        for v in dirs*2: torch.cuda.synchronize(); t = time.perf_counter(); s.hvp(v, tol=1e-6); torch.cuda.synchronize(); ts.append((time.perf_counter() - t)*1e3)
        S = s._system; whole = {**(S.__dict__.get("_whole") or {}), **(S.T.__dict__.get("_whole") or {})}
        graph = [w.graphs for key, w in whole.items() if w.cg.k == max(1, k)]; ms[k] = statistics.median(ts), events(lambda: [G.replay() for G in graph[0]]) if graph else float("nan")
        say(f"d={d} eps={eps} k={k}: hvp {ms[k][0]:.3f} ms, graph alone {ms[k][1]:.3f} ms, CG {s.cg_info.n_iter}, residual {s.cg_info.residual:.1e}, {type(s._second.p.geom).__name__}, {time.time() - T0:.0f} s")
        if eps != .05:
            from torch.profiler import profile, ProfilerActivity
            with profile(activities=[ProfilerActivity.CUDA]) as p:
                for v in dirs[:3]: s.hvp(v, tol=1e-6)
                torch.cuda.synchronize()
            c, t = collections.Counter(), collections.Counter()
            for e in p.events():
                if str(e.device_type).endswith("CUDA"): c[e.name[:50]] += 1; t[e.name[:50]] += e.device_time if hasattr(e, "device_time") else e.cuda_time
            for n, us in t.most_common(14): say(f"      {us/3:8.1f} us {c[n]/3:6.1f} x {n}")
    if d > 4:
        try: right_hand_sides(s, v, d, g)
        except Exception: traceback.print_exc()
    say(f"d={d} eps={eps}: ratio {ms[16][0]/ms[0][0]:.2f}, of graphs {ms[16][1]/ms[0][1]:.2f}")
    if eps != .05:
        who = S if "_device_cg" in S.__dict__ else S.T
        for k in (16, 1):
            if time.time() - T0 > 72: break
            try: steps(f"d={d} eps={eps}", who, k, g)
            except Exception: traceback.print_exc()
for c in ((64, .107), (3, .005), (3, .05)):
    if time.time() - T0 > 66: print('no time left for', c); break
    try: case(*c)
    except Exception: traceback.print_exc()
print("="*20, f"{time.time() - T0:.0f} s"); print("\n".join(table))
