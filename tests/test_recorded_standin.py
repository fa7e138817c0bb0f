"""Recorded products without a GPU: a CUDA graph is replaced by a function that runs again, kernels by Triton's interpreter. What this tests is the host's part: when a product is recorded, what is read in the end, and what is said."""
import pytest
from quick import interpreted

pytest.importorskip("triton")

CODE = r'''
import inspect, math, torch
import flash_sinkhorn_hessian.krylov as K, flash_sinkhorn_hessian.kernels_truncated as kt, flash_sinkhorn_hessian.truncated as tr
from flash_sinkhorn_hessian import divergence, solve
from flash_sinkhorn_hessian.core import random_problem

class Again:
    def __init__(self, run): self.replay = run
made = []
def capture_parts(fn): # all of the work in the first part
    parts = [0]; out = fn(lambda: parts.append(0)); made.append(len(parts))
    def run():
        cg, cuts = inspect.getclosurevars(fn).nonlocals["cg"], []
        def cut(): # where the third part ends it has to be repeated
            cuts.append(0)
            if len(cuts) == 3: [cg._step(t % 2) for _ in range(cg.blind//K.PART - 1) for t in range(K.PART)]
        (new, stats), (old, table) = fn(cut), out
        for s, t in zip([*new, stats], [*old, table]): t.copy_(s)
    return [Again(run), *(Again(lambda: None) for _ in parts[1:])], out
class Event:
    def record(self): pass
    synchronize = record
def see(self, solver): # a recording knows how many steps it takes, a function that runs again has to be told
    solver.blind = False
    if self.cg: self.cg.blind = 0
source = inspect.getsource(K.WholeProduct) + inspect.getsource(K.whole_product)
for old, new in ((", pin_memory=True", ""), ("torch.cuda.Event()", "Event()"), ("torch.cuda.is_current_stream_capturing()", "False"), ("not tensors[0].is_cuda or INTERPRETED or ", ""),
                 ("if cg: cg.cut = cut", "solver.blind = True\n            if cg: cg.cut, cg.blind = cut, steps"), ("        self.host.copy_(", "        see(self, solver); self.host.copy_(")):
    assert old in source, old
    source = source.replace(old, new)
K.__dict__.update(capture_parts=capture_parts, Event=Event, see=see); exec(source, K.__dict__)
K.TritonGeometry.whole_product = K.TritonSparse.whole_product = lambda self, *args: K.whole_product(*args)
K.DeviceCG.settled = lambda self, tol: self.kept is None and self.most.get(tol, 257) <= 256 and (self.modes is None or self.modes.W is self.W)
def problem(n, m, d, eps, **kw):
    q = random_problem(n, m, d, dtype=torch.float32); D = solve(*(t.double() for t in q.values()), eps=eps, tol=1e-10, backend="dense", **kw)
    return solve(*q.values(), eps=eps, tol=1e-4, backend="triton", init=D, **kw), D
def close(got, want, tol=2e-4): assert (got.double() - want).norm() < tol*want.norm(), ((got.double() - want).norm()/want.norm()).item()
'''
def run(body):
    done = interpreted(CODE + body)
    assert not done.returncode, done.stdout + done.stderr[-3000:]

def test_recorded_products_agree_with_the_dense_hessian():
    "From the second product of a kind on: one direction and three, two blocks, all pairs and truncated; a tolerance of its own needs a record of its own."
    run(r'''
for eps, share, blocks in ((.2, None, (("x", (6, 3)), (("x", "b"), (7,)))), (.05, 1, (("x", (3, 6, 3)),))):
    if share: kt.SHARE = tr.SHARE = share; tr.LEAST = 0
    S, D = problem(6, 7, 3, eps); made.clear(); assert isinstance(S._second.p.geom, tr.TruncatedGeometry) == bool(share)
    for wrt, shape in blocks:
        v = torch.randn(shape, generator=torch.Generator().manual_seed(0)); want = D.hvp(v.double(), wrt)
        for i in range(3):
            got = S.hvp(v*2**i, wrt, tol=1e-5); close(got, want*2**i); assert S.cg_info.finite == (i > 0) and S.cg_info.converged and got.dtype == torch.float32, (wrt, i, S.cg_info)
    assert made == [2]*len(blocks), made
S.hvp(v, wrt, tol=1e-3); assert not S.cg_info.finite; S.hvp(v, wrt, tol=1e-3); assert S.cg_info.finite and made == [2, 2]
''')

def test_many_steps_are_recorded_in_parts_and_a_record_that_fails_is_made_anew():
    run(r'''
K.PART = 4
S, D = problem(10, 9, 3, .02); made.clear(); v = torch.randn(10, 3)
for _ in range(2): close(S.hvp(v, tol=1e-6), D.hvp(v.double()), 5e-4)
assert S.cg_info.n_iter >= 8 and made == [4] and S.cg_info.finite, (S.cg_info, made)
cg = next(iter((S._system.T if S.problem.a.shape[-1] < S.problem.b.shape[-1] else S._system)._device_cg.values())); cg.most[1e-6] = 2; S._again = (None,)*3; S._system._whole.clear(); made.clear()
close(S.hvp(v, tol=1e-6), D.hvp(v.double()), 5e-4); assert made == [2] and not S.cg_info.finite and cg.most[1e-6] > 2      # two steps were too few: the usual road
close(S.hvp(v, tol=1e-6), D.hvp(v.double()), 5e-4); assert made == [2, 4] and S.cg_info.finite
''')

def test_a_cloud_with_itself_takes_chebyshevs_steps():
    run(r'''
for kw in ({}, dict(reach=.5)):
    q = random_problem(5, 4, 3, dtype=torch.float32); D = divergence(*(t.double() for t in q.values()), eps=.4, tol=1e-10, backend="dense", **kw); S = divergence(*q.values(), eps=.4, tol=1e-4, backend="triton", init=D, **kw)
    for wrt, shape in ((("a", (2, 5)),) if kw else (("x", (5, 3)),)):
        for seed in range(3):
            v = torch.randn(shape, generator=torch.Generator().manual_seed(seed)); close(S.hvp(v, wrt, tol=1e-5), D.hvp(v.double(), wrt)); info = S.xx.cg_info
        assert info.method == "chebyshev" and info.converged and info.finite and info.residual <= 1e-5
''')

def test_first_products_come_from_the_record_of_their_shape():
    "From the third solution of a shape on: a cross block, relaxed, and a divergence with a cloud with itself; a point without weight and another question take the long road."
    run(r'''
from contextlib import contextmanager
import flash_sinkhorn_hessian.triton_geometry as T
from flash_sinkhorn_hessian.gradient import Moments
def leaves(t): return [t] if isinstance(t, torch.Tensor) else [s for u in (vars(t).values() if hasattr(t, "__dataclass_fields__") else t if isinstance(t, (tuple, list)) else ()) for s in leaves(u)]
class Once(Again):
    def __init__(self, fn): self.fn, self.out = fn, fn()
    def replay(self):
        for mine, new in zip(leaves(self.out), leaves(self.fn())): mine.copy_(new)
def whole(fn): # all of the work in the first part
    once = Once(lambda: fn(lambda: None)); return [once, *[Again(lambda: None)]*3], once.out
@contextmanager
def turn(self):
    with self.lock: yield
def one(fn, beside=None): once = Once(fn); return once, once.out
gpu = []; T.capture, T.recordable, T.Shared.turn, K.capture_parts = one, lambda t: bool(gpu), turn, whole; K.PART = 4
source = inspect.getsource(K.FirstProduct)
for old, new in ((", pin_memory=True", ""), ("torch.cuda.Event()", "Event()")): assert old in source, old; source = source.replace(old, new)
exec(source, K.__dict__)
for n, m, wrt, kind, kw in ((4, 3, ("x", "b"), solve, dict(reach=.5)), (3, 3, "x", divergence, {})):
    T._loops.clear(); T._asked.clear(); gpu.clear(); q = random_problem(n, m, 2, dtype=torch.float32)
    D = kind(*(t.double() for t in q.values()), eps=.15, tol=1e-10, backend="dense", **kw); S = kind(*q.values(), eps=.15, tol=1e-3, backend="triton", init=D, **kw); gpu.append(1); own = [S.xy, S.xx] if kind is divergence else [S]
    v = torch.randn((n, 2) if kind is divergence else (m,), generator=torch.Generator().manual_seed(0)); ask = lambda t, v, tol=1e-3: K.first_product(t, v, ("x",), torch.float64 if kind is divergence else torch.float32, True, tol, 1000, 0.)
    d = v[None]; asked = [dict(x=d), dict(x=d, y=d)] if kind is divergence else [dict(b=d)]
    for t, one in zip(own, asked):
        for _ in range(2): T.loop_for(t.problem.geom)                             # the loop of a shape is made at the third call
        for _ in range(2): assert ask(t, one) is None; t._firsts.clear()         # two solutions of the shape before this one
    for r in (1, 2):
        got, want = S.hvp(r*v, wrt, tol=1e-3), r*D.hvp(v.double(), wrt); close(got, want, 2e-3)
        for t in own: assert [h[0] for h in t._firsts.values()] == [r] and t.cg_info.converged and t.cg_info.finite, (r, t._firsts, t.cg_info)
    if kind is divergence: assert S.xx.cg_info.method == "chebyshev"
    else:
        assert ask(S, asked[0], 1e-2) is None and [h[0] for h in S._firsts.values()] == [2, 0]                          # another question
        q["a"][0] = 0; q["a"] /= q["a"].sum(); gpu.clear(); Z = solve(*q.values(), eps=.15, tol=1e-3, backend="triton", **kw); gpu.append(1); assert ask(Z, asked[0]) is None and len(Z._firsts) == 1      # a point without weight
''')
