"""A training step of SamplesLoss beside GeomLoss's, and of costs that are solved to the tolerance of their dtype, a line each. On a GPU machine: `PYTHONPATH=. python tests/report_loss_gpu.py` (GeomLoss, if it is there)."""
import statistics, time

import torch

from flash_sinkhorn_hessian import SamplesLoss, ot_cost, sinkhorn_divergence, solve
try: import geomloss
except ImportError: geomloss = None

def wall(fn, reps=15, warm=6):
    for _ in range(warm): fn()
    torch.cuda.synchronize(); times = []
    for _ in range(reps): start = time.perf_counter(); fn(); torch.cuda.synchronize(); times.append(time.perf_counter() - start)
    return 1e3*statistics.median(times)

def row(n, d, blur):
    "New points in the unit cube every call, two of them its corners, so that every schedule has the same levels."
    y, corners = torch.rand(n + 10, d, device='cuda'), torch.tensor([[0.]*d, [1.]*d], device='cuda')
    def cloud(): x = torch.rand(n, d, device='cuda'); x[:2] = corners; return x
    def times(L): return wall(lambda: L(cloud(), y)), wall(lambda: L(cloud().requires_grad_(), y).backward())
    L = SamplesLoss(blur=blur); said = f'SamplesLoss n={n} d={d} blur={blur}: forward %.2f ms, forward and backward %.2f ms' % times(L)
    if geomloss and n <= 5000:
        P, x = geomloss.SamplesLoss('sinkhorn', p=2, blur=blur, backend='tensorized'), cloud()
        said += '; geomloss, tensorized: %.2f / %.2f ms' % times(P) + f'; values {L(x, y).item():.6f} {P(x, y).item():.6f}'
    print(said, flush=True)

def solved(n, eps):
    "A point cloud that moves a little every call, value and gradient of converged problems."
    x, y = (torch.rand(n, 3, device='cuda') for _ in 'xy'); moved = lambda: (x + .01*torch.randn_like(x)).requires_grad_()
    step = lambda loss: wall(lambda: loss(moved(), y).backward()); s = solve(x, y, eps=eps)
    print(f'converged, n={n} d=3 eps={eps}: ot_cost %.2f ms, relaxed (reach .5) %.2f, sinkhorn_divergence %.2f; {s.n_iter} pairs of passes, {s.info.newton_steps} Newton steps, error {s.marginal_error:.0e}' % tuple(
        map(step, (lambda x, y: ot_cost(x, y, eps=eps), lambda x, y: ot_cost(x, y, eps=eps, reach=.5), lambda x, y: sinkhorn_divergence(x, y, eps=eps)))), flush=True)

if __name__ == '__main__':
    print(torch.cuda.get_device_name(), torch.__version__, geomloss and geomloss.__version__)
    for n, d, blur in ((300, 3, .2), (1000, 3, .05), (10000, 3, .05), (5000, 64, .7)): row(n, d, blur)
    for n in (100, 500, 2000, 5000):
        for eps in (.05, .01): solved(n, eps)
