"""JAX on the Triton kernels: agreement with the PyTorch side, and times beside XLA, a line each. On a GPU machine: `PYTHONPATH=. python tests/report_jax_gpu.py`."""
import os, time
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')     # two frameworks share the memory

import jax
import jax.numpy as jnp
import numpy as np
import torch

from flash_sinkhorn_hessian import SinkhornHessian, TorchSinkhornHessian, divergence, solve
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.jax import reg_ot_cost, reg_ot_divergence

jax.config.update('jax_enable_x64', True)
GPU = torch.cuda.is_available()
ROAD = 'triton' if GPU else 'streaming'                             # without a GPU: the same bridge, other kernels

def relative(got, want):
    got, want = (np.asarray(t.detach().cpu() if isinstance(t, torch.Tensor) else t, np.float64) for t in (got, want))
    return float(np.linalg.norm(got - want)/np.linalg.norm(want))

def timed(fn, *args):
    jax.block_until_ready(fn(*args)); best = np.inf
    for _ in range(3):
        start = time.perf_counter(); jax.block_until_ready(fn(*args)); best = min(best, time.perf_counter() - start)
    return 1e3*best

def clouds(n, m, d, dtype, seed=0):
    q = {k: t.to(dtype) for k, t in random_problem(n, m, d, seed=seed).items()}
    j = [jnp.asarray(t.numpy()) for t in q.values()]
    return q, j, jnp.asarray(torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(dtype).numpy())

def functions(fn, j, eps, **kw):
    loss = lambda x: fn(x, *j[1:], eps, **kw)
    return loss, jax.grad(loss), lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1]

def agreement(name, fn, make, dtype, n=300, m=257, d=3, eps=.05, **kw):
    "Outside and inside jit, against PyTorch on the CPU in float64 at the same points."
    q, j, v = clouds(n, m, d, dtype)
    sol = make(**{k: t.double() for k, t in q.items()} | ({} if kw else {k: q[k].double()/q[k].double().sum() for k in 'ab'}), eps=eps, **kw)
    want = sol.value, sol.grad(), sol.hvp(torch.from_numpy(np.array(v)).double())
    for how, run in (('dlpack', lambda f: f), ('jit', jax.jit)):
        value, grad, product = map(run, functions(fn, j, eps, backend=ROAD, **kw))
        print(f'{name:34} {how:7} value {relative(value(j[0]), want[0]):.1e}  gradient {relative(grad(j[0]), want[1]):.1e}  product {relative(product(j[0], v), want[2]):.1e}', flush=True)

def speed(n, d, eps, roads):
    "Warm times of value and gradient, and of a product with its solve, in float32; and PyTorch alone."
    q, j, v = clouds(n, n, d, torch.float32)
    for road in roads:
        _, grad, product = functions(reg_ot_cost, j, eps, backend=road)
        for how, run in ((('dlpack', lambda f: f),) if road != 'xla' else ()) + (('jit', jax.jit),):
            fresh = iter(range(100)); move = lambda: j[0] + jnp.float32(1e-4*next(fresh))     # new points each time: nothing is remembered
            a, b = run(grad), run(product)
            print(f'n={n} d={d} eps={eps:.3g} {road:9} {how:7} gradient {timed(lambda: a(move())):8.1f} ms   product, solve included {timed(lambda: b(move(), v)):8.1f} ms', flush=True)
    x, y, w = (t.cuda() if GPU else t for t in (q['x'], q['y'], torch.from_numpy(np.array(v))))
    a, b = (t.cuda() if GPU else t for t in (q['a'], q['b']))
    def there(what): 
        out = what(solve(x + 1e-4*torch.rand((), device=x.device), y, a, b, eps=eps, backend=ROAD))
        if GPU: torch.cuda.synchronize()
        return out.cpu().numpy()
    print(f'n={n} d={d} eps={eps:.3g} PyTorch alone     gradient {timed(there, lambda s: s.grad()):8.1f} ms   product, solve included {timed(there, lambda s: s.hvp(w)):8.1f} ms', flush=True)

def classes(n, m, eps):
    "The class in both frameworks on the same kernels."
    q, j, v = clouds(n, m, 3, torch.float64)
    S, T = SinkhornHessian(backend=ROAD), TorchSinkhornHessian()
    s, t = S.solve_ott(*j, eps, 1e-11), T.solve_ott(*q.values(), eps, 1e-11); w = torch.from_numpy(np.array(v))
    print(f'class n={n} m={m} float64: cost {relative(s.reg_ot_cost, t.reg_ot_cost):.1e}  gradient {relative(S.dOTdx(s), T.dOTdx(t)):.1e}  Hessian {relative(S.compute_hessian(s), T.compute_hessian(t)):.1e}'
          f'  product {relative(S.hessian_vector_product(s, v), T.hessian_vector_product(t, w)):.1e}', flush=True)

if __name__ == '__main__':
    print(torch.cuda.get_device_name() if GPU else 'no GPU: the streaming backend through the same bridge', '| jax', jax.__version__, jax.default_backend(), '| torch', torch.__version__)
    for dtype in (torch.float64, torch.float32):
        tag = str(dtype)[6:]
        agreement(f'cost {tag}', reg_ot_cost, solve, dtype)
        agreement(f'divergence {tag}', reg_ot_divergence, divergence, dtype)
        agreement(f'divergence, reach .5 and 1, {tag}', reg_ot_divergence, divergence, dtype, reach_x=.5, reach_y=1.)
    agreement('cost float32 d=64', reg_ot_cost, solve, torch.float32, d=64, eps=1.)
    classes(300, 257, .05)
    q, j, _ = clouds(40, 30, 3, torch.float64)
    H = jax.jit(jax.hessian(functions(reg_ot_divergence, j, .1, backend=ROAD)[0]))(j[0])
    print(f'jax.hessian n=40 float64: {relative(H, divergence(**q, eps=.1).hessian()):.1e}')
    if jax.default_backend() == 'gpu': print('auto is', SinkhornHessian()._task(j[0]))
    for n, d, eps in ((1000, 3, .05), (10000, 3, .05), (10000, 64, 1.)) if GPU else ((1000, 3, .05),): speed(n, d, eps, (ROAD, 'xla'))
    if GPU:
        speed(50000, 3, .05, (ROAD,))
        stats = jax.devices()[0].memory_stats() or {}
        print(f'peak at n=50000: torch {torch.cuda.max_memory_allocated()/2**20:.0f} MiB, jax {stats.get("peak_bytes_in_use", 0)/2**20:.0f} MiB; one n x n array would be {4*50000**2/2**20:.0f}')
