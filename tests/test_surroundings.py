"""What PyTorch may be set to around a call: a default device, inference mode; and what a call leaves behind."""
import gc, warnings, weakref

import pytest, torch

from flash_sinkhorn_hessian import ConvergenceWarning, SamplesLoss, TorchSinkhornHessian, divergence, ot_cost, solve
from flash_sinkhorn_hessian.flash_sinkhorn import c_transform, from_potentials
from flash_sinkhorn_hessian.linear_algebra import entropic_map, extreme_eigenvalues, linear_operator, newton_points, spectral_gap, stochastic_trace

backends = pytest.mark.parametrize('backend', ['auto', 'streaming', 'dense'])
def clouds(n=30, m=35, d=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0); return torch.rand(n, d, generator=g, dtype=torch.float64).to(dtype), torch.rand(m, d, generator=g, dtype=torch.float64).to(dtype)
def relative(got, want): return ((got.double() - want.double()).norm()/want.double().norm()).item()

@backends
def test_another_default_device(backend):
    "Numbers follow the points, and nothing of ours hands the C kernels memory of another device."
    x, y = clouds()
    def all_of_it():
        s, t = solve(x, y, eps=.1, backend=backend), divergence(x, y, eps=.1, reach=1., backend=backend)
        loss = SamplesLoss(backend='streaming'); z = x.clone().requires_grad_()
        return (s.value, s.hvp(x), s.grad('y'), s.hessian('a'), t.value, t.hvp(x), torch.autograd.grad(loss(z, y), z)[0], entropic_map(s, x), newton_points(s, damping=1.), extreme_eigenvalues(s, v0=x.flatten().numpy()),
                *(v if isinstance(v, torch.Tensor) else x.new_full((), v) for v in (spectral_gap(s, v0=y[:, 0].numpy()), stochastic_trace(s)[0])), from_potentials(x, y, s.f, s.g, eps=.1, backend=backend).value)
    want = all_of_it()
    with torch.device('meta'): got = all_of_it()
    for one, two in zip(got, want): assert one.device.type == 'cpu' and relative(one, two) < 1e-9

@backends
@pytest.mark.parametrize('make', [solve, divergence])
def test_inference_mode_leaves_no_trace(make, backend):
    x, y = clouds(); z = x.clone().requires_grad_(); s = make(z, y, eps=.1, backend=backend)
    with torch.inference_mode(): first = s.hvp(x), s.grad(), s.value
    g, = torch.autograd.grad(s.value, z, create_graph=True); h, = torch.autograd.grad((g*x).sum(), z); again = s.hvp(x), s.grad(), s.value
    for one, two in zip(first, again): assert relative(one, two) < 1e-12
    assert relative(h, first[0]) < 1e-9
    with torch.inference_mode(): w = x.clone(); t = make(w, y, eps=.1, backend=backend); t.hvp(w)
    assert relative(t.hvp(x), h) < 1e-9 and not t.value.requires_grad

@pytest.mark.parametrize('make', [solve, divergence])
def test_a_solution_is_freed_at_once(make):
    x, y = clouds()
    uses = dict(hessian_operator=lambda s: s.hessian_operator() @ x.flatten().numpy(), linear_operator=linear_operator, eigenvalues=extreme_eigenvalues, newton=lambda s: newton_points(s, damping=1.), trace=stochastic_trace, hessian=lambda s: s.hessian(), hvp=lambda s: s.hvp(x))
    for name, use in uses.items():
        gc.collect(); gc.disable()
        try:
            s = make(x, y, eps=.1); link = weakref.ref(s); use(s); del s
            assert link() is None, name
        finally: gc.enable()

def test_the_class_without_compiled_kernels_is_differentiable():
    x, y = clouds(); z = x.clone().requires_grad_()
    one, two = (torch.autograd.grad(TorchSinkhornHessian(use_compile=c).solve_ott(z, y).reg_ot_cost, z)[0] for c in (True, False)); assert relative(one, two) < 1e-7

def test_the_other_road_to_a_batched_product_is_refused_in_words():
    x, y = clouds()
    with pytest.raises(NotImplementedError, match='torch.func.hessian'):
        torch.autograd.functional.hessian(lambda t: ot_cost(t, y, eps=.1), x, vectorize=True, outer_jacobian_strategy='forward-mode')

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_c_transform_of_half_precision(dtype):
    x, y = clouds(dtype=dtype); v, j = c_transform(x, y, y[:, 0]); assert v.dtype == dtype and torch.equal(j, c_transform(x.float(), y.float(), y[:, 0].float())[1])
