"""Truncated kernels: second derivatives on the pairs that matter against the dense backend, on problems the notebooks do not have."""
from dataclasses import replace

import pytest, torch

from flash_sinkhorn_hessian import Solution, divergence, solve
from flash_sinkhorn_hessian.dual_energy import DenseGeometry
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.truncated import TruncatedGeometry, truncated

def rel(got, want): return ((got.double() - want.double()).norm()/want.double().norm()).item()

def at_the_same_potentials(s):
    "The dense float64 solution of the same points, whose potentials are those of s: what differs is the products alone."
    p = replace(s.problem, geom=DenseGeometry(s.problem.geom.x, s.problem.geom.y, s.problem.eps))
    return Solution(replace(s.inputs, x=s.inputs.x.double(), y=s.inputs.y.double()), p, s._f, s._g, s.info, s._offset, s.tol)

CASES = {'balanced': {}, 'relaxed': dict(reach=.3), 'half relaxed, half cost': dict(reach_y=.2, half_cost=True)}

@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize('kw', CASES.values(), ids=CASES)
@pytest.mark.parametrize('n, m, d, eps', [(301, 420, 2, .0008), (500, 380, 5, .006)])
def test_every_block(n, m, d, eps, kw, dtype, bound):
    if 'half_cost' in kw: eps = eps/2
    q = random_problem(n, m, d, seed=n + d); q['a'][3] = 0; q['a'] /= q['a'].sum()
    q = {k: t.to(dtype) for k, t in q.items()}
    s = solve(**q, eps=eps, backend='streaming', **kw); w = at_the_same_potentials(s)
    assert isinstance(s._second.p.geom, TruncatedGeometry)
    g = torch.Generator().manual_seed(d)
    for u in 'xyab':
        v = torch.randn(2, *q[u].shape, generator=g).to(dtype)
        for out in 'xyab':
            assert rel(s.hvp(v, (out, u)), w.hvp(v.double(), (out, u))) < bound, (out, u)
        assert s.cg_info.converged

def test_divergence_and_batches():
    q = random_problem(300, 310, 3, seed=5, batch=2); v = torch.randn(3, 2, 300, 3, dtype=torch.float64)
    s, w = (divergence(**q, eps=.0015, backend=b, tol=1e-10) for b in ('streaming', 'dense'))
    assert isinstance(s.xy._second.p.geom, TruncatedGeometry) and rel(s.hvp(v), w.hvp(v)) < 1e-8

@pytest.mark.parametrize('shift', [0., 1000.])
def test_row_sums_at_a_small_eps(shift):
    q = random_problem(1500, 1500, 3, dtype=torch.float32, seed=1); q['x'] += shift; q['y'] += shift
    s = solve(**q, eps=.002, backend='streaming'); got = s.hvp(torch.ones_like(q['x']))
    assert isinstance(s._second.p.geom, TruncatedGeometry) and (got/(2*q['a'][:, None]) - 1).abs().max() < 1e-3

def test_none_where_it_does_not_pay():
    for q, eps in ((random_problem(40, 50), .001), (random_problem(400, 400), 1.)):
        s = solve(**q, eps=eps, backend='streaming')
        assert truncated(s.problem, s._f, s._g) is None and s._second is s.moments
