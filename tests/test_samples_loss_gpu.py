"""SamplesLoss where it trains: memory, repeatability, mixed precision and the compiler on a GPU. One command there: `python -m pytest tests/test_samples_loss_gpu.py`, or `python tests/test_samples_loss_gpu.py`."""
import gc, os, resource, threading, time
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')    # cuBLAS repeats itself only so, and reads this once: before the first product
try: import pytest
except ImportError: pytest = None     # run as a script on a machine without it
import torch
from torch.autograd import grad

from flash_sinkhorn_hessian import SamplesLoss, divergence, ot_cost, ot_hvp, sinkhorn_divergence, solve
from flash_sinkhorn_hessian.core import random_problem
if pytest: pytestmark = pytest.mark.cuda

DEVICE = 'cuda'

def on(n, m, d, dtype=torch.float32, seed=0, **kw): return {k: t.to(DEVICE) for k, t in random_problem(n, m, d, seed=seed, dtype=dtype, **kw).items()}
def relative(got, want): return ((got.double() - want.double()).norm()/want.double().norm()).item()

def training(steps, n=300, d=3, seed=0, second=False, **kw):
    "The losses of a small network, one by one; `second`: with a penalty on the gradient, so that each step differentiates twice."
    torch.manual_seed(seed)
    net, y = torch.nn.Linear(4, d, device=DEVICE), torch.randn(n + 10, d, device=DEVICE)
    opt, L = torch.optim.SGD(net.parameters(), .05), SamplesLoss(**dict(blur=.2) | kw)
    for _ in range(steps):
        x = net(torch.randn(n, 4, device=DEVICE)); loss = L(x, y)
        if second: loss = loss + 1e-2*n*grad(loss, x, create_graph=True)[0].square().sum()
        opt.zero_grad(); loss.backward(); opt.step(); yield loss.item()

def load_libraries(n):
    "What linear algebra loads when a Newton step first needs it (`eigh`: 32 MiB on the host, 20 on the device), as early as it can be had: in a training it may be the hundredth step that does, and it is no leak."
    A = 2*torch.eye(n, dtype=torch.float64, device=DEVICE)
    torch.linalg.cholesky_ex(A); torch.cholesky_solve(A, A); torch.linalg.eigh(A); torch.linalg.qr(A); torch.linalg.solve(A, A)

def grown(second, steps, warm, **kw):
    "MiB that tensors, the device's allocator and the process hold more after `steps` than after `warm` of them."
    here = lambda: (gc.collect(), torch.cuda.synchronize(), torch.cuda.memory_allocated()/2**20, torch.cuda.memory_reserved()/2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)[2:]
    load_libraries(kw.get('n', 300))
    for k, _ in enumerate(training(warm + steps, second=second, **kw)):
        if k == warm:
            for t in threading.enumerate(): # what the compiler needs in the background is no leak
                if t.name == "kernels of other sizes": t.join()
            before = here()
    return [b - a for a, b in zip(before, here())]

def test_a_thousand_steps_leak_nothing():
    device, reserved, host = grown(False, 1000, 100)
    assert device < 1 and reserved < 32 and host < 16, f'{device:.2f} MiB on the device, {reserved:.0f} MiB of it reserved and {host:.1f} MiB on the host more after 1000 steps'

def test_twice_differentiated_steps_leak_nothing():
    device, reserved, host = grown(True, 200, 50, n=100)
    assert device < 1 and reserved < 32 and host < 16, f'{device:.2f} MiB on the device, {reserved:.0f} MiB of it reserved and {host:.1f} MiB on the host more after 200 steps'

def repeat(fn, deterministic):
    "Twice the same: True, False, or the error that says which pass is not deterministic."
    torch.use_deterministic_algorithms(deterministic)
    try: return fn() == fn()
    except RuntimeError as e:
        assert 'determinis' in str(e), e
        return str(e)
    finally: torch.use_deterministic_algorithms(False)

def test_same_numbers_twice():
    "With PyTorch's flag set everything repeats itself, or an error says what cannot; without it, the sums of columns are added in any order."
    assert repeat(lambda: list(training(1000)), True) is True, 'a training does not repeat itself, or a pass refuses to'
    q = on(3000, 3100, 3); v = torch.randn(3000, 3, device=DEVICE)
    ways = dict(training=lambda: list(training(50)), twice=lambda: list(training(20, n=100, second=True)), solve=lambda: solve(**q, eps=.05).f.tolist(), value=lambda: solve(**q, eps=.05).value.item(),
                gradient=lambda: solve(**q, eps=.05).grad().tolist(), product=lambda: solve(**q, eps=.05).hvp(v).tolist(), divergence=lambda: divergence(**q, eps=.05).grad().tolist(),
                relaxed=lambda: divergence(**q, eps=.05, reach=.5).hvp(v).tolist())
    said = {k: repeat(fn, True) for k, fn in ways.items()}
    print(said)
    assert not [k for k, s in said.items() if s is False], said

def test_autocast():
    q = on(300, 400, 5); lin = torch.nn.Linear(5, 3, device=DEVICE); y = torch.randn(400, 3, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(DEVICE, dtype=dtype):
            low = lin(q['x']); L = SamplesLoss(blur=.3); loss = L(low, y)
            s = solve(low, y.to(dtype), eps=.1); w = solve(q['x'], q['y'], eps=.1); product = w.hvp(q['x'])
        assert low.dtype == dtype and loss.dtype == s.value.dtype == torch.float32
        assert relative(loss, L(low.detach().double(), y.double())) < 1e-5 and relative(s.value, solve(low.detach().double(), y.to(dtype).double(), eps=.1).value) < 1e-5
        assert relative(product, solve(q['x'].double(), q['y'].double(), eps=.1).hvp(q['x'].double())) < 2e-5      # mixed precision stays outside
        loss.backward(); assert lin.weight.grad.norm() > 0

def test_against_float64_and_the_cpu():
    for n, m, d, blur in ((300, 257, 3, .1), (2000, 1500, 3, .1), (500, 700, 64, .7)):
        q = on(n, m, d); v = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        def numbers(device, dtype):
            x, y, a, b = (q[k].to(device, dtype) for k in 'xyab'); x.requires_grad_()
            if dtype == torch.float64: a, b = a/a.sum(), b/b.sum()
            value = SamplesLoss(blur=blur)(a, x, b, y); g, = grad(value, x, create_graph=True)
            return [t.cpu() for t in (value.detach(), g.detach(), grad((g*v.to(g)).sum(), x)[0])]
        want = numbers('cpu', torch.float64)
        for got, bound in zip(numbers(DEVICE, torch.float32), (1e-5, 2e-5, 5e-5)): assert relative(got, want[0 if got.ndim == 0 else 1 if bound == 2e-5 else 2]) < bound, (n, d, bound)
        if n < 1000: assert all(relative(g, w) < 1e-8 for g, w in zip(numbers(DEVICE, torch.float64), want))

def test_compiled_without_a_graph_break():
    "The loss and the functional forms under torch.compile, with the default compiler: value, gradient, product; a loss made outside or inside; points in any layout."
    q = on(200, 220, 3); x, y, a, b = q.values(); v = torch.randn_like(x); L = SamplesLoss(blur=.2)
    def close(f, x):
        c = torch.compile(f, fullgraph=True); X, Z = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert relative(c(X), f(Z)) < 1e-5 and relative(grad(c(X), X)[0], grad(f(Z), Z)[0]) < 1e-5
    ways = dict(outside=(lambda x: L(a, 2*x, b, y)**2, x), inside=(lambda x: SamplesLoss(blur=.2)(a, 2*x, b, y)**2, x),
                cost=(lambda x: ot_cost(2*x, y, a, b, eps=.1)**2, x), divergence=(lambda x: sinkhorn_divergence(2*x, y, a, b, eps=.1)**2, x),
                permuted=(lambda x: L(x.permute(2, 1, 0), y.expand(2, -1, -1)).sum()**2, torch.randn(3, 200, 2, device=DEVICE)))
    said = {}
    for k, (f, z) in ways.items():
        try: close(f, z)
        except Exception as e: said[k] = f'{type(e).__name__}: {str(e)[:400]}'
    c = torch.compile(lambda x, v: 2*ot_hvp(v, x, y, a, b, eps=.1), fullgraph=True)
    try: assert relative(c(x, v), 2*solve(x, y, a, b, eps=.1).hvp(v)) < 1e-5
    except Exception as e: said['product'] = f'{type(e).__name__}: {str(e)[:400]}'
    assert not said, said

if __name__ == '__main__':
    for test in (test_against_float64_and_the_cpu, test_autocast, test_compiled_without_a_graph_break, test_same_numbers_twice, test_twice_differentiated_steps_leak_nothing, test_a_thousand_steps_leak_nothing):
        start = time.perf_counter()
        try: test(); print('passed', test.__name__, f'in {time.perf_counter() - start:.0f} s', flush=True)
        except Exception as e: print('FAILED', test.__name__, type(e).__name__, str(e)[:3000], flush=True)
