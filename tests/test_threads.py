"""One solution, loss or graph in the hands of several threads: the numbers of one thread."""
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from torch.autograd import grad

from flash_sinkhorn_hessian import SamplesLoss, divergence, ot_cost, solve
from flash_sinkhorn_hessian.core import random_problem

def problem(n, m, dtype=torch.float64, seed=0):
    q = {k: t.to(dtype) for k, t in random_problem(n, m, 3, seed=seed).items()}
    gen = torch.Generator().manual_seed(seed); return q, [torch.randn(n, 3, generator=gen).to(dtype) for _ in range(8)]

def together(fn, args, threads=4):
    with ThreadPoolExecutor(threads) as ex: return list(ex.map(fn, args))

def same(got, want, bound): assert all(((g - w).norm()/w.norm()) < bound for g, w in zip(got, want, strict=True)), [((g - w).norm()/w.norm()).item() for g, w in zip(got, want)]

@pytest.mark.parametrize('backend', ['streaming', 'auto', 'dense'])
@pytest.mark.parametrize('make', [solve, divergence])
def test_one_solution(make, backend):
    n, m = (1100, 1000) if backend == 'auto' else (300, 280)
    q, vs = problem(n, m); vs = vs[:4]; s, alone = (make(**q, eps=.05, backend=backend) for _ in range(2))
    same(together(s.hvp, vs), want := [alone.hvp(v) for v in vs], 1e-7)
    same([s.hvp(v) for v in vs], want, 1e-7)              # nothing wrong was learnt
    same(together(s.apply, [v[:m] for v in vs]), [alone.apply(v[:m]) for v in vs], 1e-12)
    same(together(s.grad, ['x', 'y', 'a', 'b']), [alone.grad(u) for u in 'xyab'], 1e-12)
    jobs = [lambda: s.hvp(vs[0]), lambda: s.grad('x'), lambda: s.apply(vs[0][:m]), lambda: s.hvp(vs[1], ('x', 'x'))]
    same(together(lambda f: f(), jobs*2), [f() for f in jobs]*2, 1e-7)

def test_one_graph():
    q, vs = problem(300, 280, torch.float32)
    for loss in (lambda x: ot_cost(x, q['y'], eps=.05), lambda x: SamplesLoss(blur=.2)(x, q['y'])):
        def products(run):
            x = q['x'].clone().requires_grad_(); g, = grad(loss(x), x, create_graph=True)
            return run(lambda v: grad(g, x, v, retain_graph=True)[0], vs)
        same(products(together), products(lambda f, vs: [*map(f, vs)]), 1e-4)

def test_one_jitted_function():
    jax = pytest.importorskip('jax'); from flash_sinkhorn_hessian.jax import reg_ot_cost
    (q, vs) = problem(60, 50, torch.float32); x, y, a, b = (jax.numpy.asarray(q[k].numpy()) for k in 'xyab')
    product = jax.jit(lambda v: jax.jvp(jax.grad(lambda x: reg_ot_cost(x, y, a, b, .05, backend='streaming')), (x,), (v,))[1])
    vs = [jax.numpy.asarray(v.numpy()) for v in vs]
    got, want = together(product, vs), [product(v) for v in vs]
    assert all(jax.numpy.linalg.norm(g - w) < 1e-4*jax.numpy.linalg.norm(w) for g, w in zip(got, want))
