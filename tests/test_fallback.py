"""No compiler, or nowhere to keep what it made: plain tiles, said once, and right."""
import json, stat

import pytest, torch
from quick import forked

CODE = """
import json, sys, warnings
import torch
from flash_sinkhorn_hessian import divergence, solve
g = torch.Generator().manual_seed(0)
dims, dtypes = json.loads(sys.argv[1]), [getattr(torch, o) for o in json.loads(sys.argv[2])]
out = []
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always' if len(sys.argv) > 3 else 'default')
    for dtype in dtypes:
        for d in dims:
            x, y, a = torch.rand(23, d, generator=g).to(dtype), torch.rand(29, d, generator=g).to(dtype), torch.rand(23, generator=g).to(dtype) + .1
            for reach in (None, 1.):
                for front in (solve, divergence):
                    got, want = (front(x, y, a/a.sum(), eps=.05*d, reach=reach, backend=o) for o in ('streaming', 'dense'))
                    e = lambda s, t: ((s - t).abs().max()/t.abs().max()).item()
                    out.append(max(e(got.value, want.value), e(got.grad('x'), want.grad('x')), e(got.hvp(x), want.hvp(x)), e(got.hvp(a, 'a'), want.hvp(a, 'a'))) / (1e-9 if dtype == torch.float64 else 1e-4))
print(json.dumps(dict(worst=max(out), seen=[[o.category.__name__, str(o.message)] for o in seen if not issubclass(o.category, ResourceWarning)])))
"""

def run(dims=(3,), dtypes=('float64',), always=False, **env):
    done = forked(CODE, json.dumps(dims), json.dumps(dtypes), *['always'][:always], timeout=120, **env)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got['worst'] < 1, got
    return got['seen']

@pytest.mark.parametrize('cc', ['/bin/false', '/no/such/compiler'])
def test_no_compiler_is_said_once(cc, tmp_path):
    (kind, text), = run(CC=cc, XDG_CACHE_HOME=str(tmp_path))
    assert kind == 'RuntimeWarning' and 'plain tiles' in text and cc in text

@pytest.mark.parametrize('always', [False, True])
def test_once_for_all_dimensions_and_dtypes(always, tmp_path):
    assert len(run(dims=(2, 3), dtypes=('float32', 'float64'), always=always, CC='/bin/false', XDG_CACHE_HOME=str(tmp_path))) == 1

def test_nothing_on_the_path(tmp_path):
    (kind, text), = run(CC='', PATH='/nowhere', XDG_CACHE_HOME=str(tmp_path))
    assert kind == 'RuntimeWarning' and 'compiler' in text

def test_compiled_is_silent_and_kept(tmp_path):
    from flash_sinkhorn_hessian.streaming import compiled_kernel
    if compiled_kernel(3, torch.float64) is None: pytest.skip('no C compiler')
    assert run(XDG_CACHE_HOME=str(tmp_path)) == []
    kept = list(tmp_path.rglob('*.so'))
    assert kept and not [o for o in tmp_path.rglob('*') if o.is_file() and o.suffix != '.so']
    assert run(XDG_CACHE_HOME=str(tmp_path)) == [] and set(tmp_path.rglob('*.so')) == set(kept)

def test_cache_that_is_a_file(tmp_path):
    (tmp_path/'cache').write_text('')
    assert all(k == 'RuntimeWarning' for k, _ in run(XDG_CACHE_HOME=str(tmp_path/'cache')))

def test_read_only_cache(tmp_path):
    (tmp_path/'flash_sinkhorn_hessian').mkdir()
    for p in (tmp_path/'flash_sinkhorn_hessian', tmp_path): p.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try: assert all(k == 'RuntimeWarning' for k, _ in run(XDG_CACHE_HOME=str(tmp_path)))
    finally:
        for p in (tmp_path, tmp_path/'flash_sinkhorn_hessian'): p.chmod(stat.S_IRWXU)

def test_damaged_cache(tmp_path):
    "A library that does not load is made anew, or does without; never a crash."
    from flash_sinkhorn_hessian.streaming import compiled_kernel
    if compiled_kernel(3, torch.float64) is None: pytest.skip('no C compiler')
    run(XDG_CACHE_HOME=str(tmp_path))
    for p in tmp_path.rglob('*.so'): p.write_bytes(b'not a library')
    assert all(k == 'RuntimeWarning' for k, _ in run(XDG_CACHE_HOME=str(tmp_path)))
