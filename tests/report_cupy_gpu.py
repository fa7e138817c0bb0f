"""CuPy's iterative methods on our Hessians, and what they copy to the host. On a GPU machine with CuPy: `PYTHONPATH=. python tests/report_cupy_gpu.py`."""
import json, os, sys, tempfile, time
import numpy as np, torch, cupy, cupyx.scipy.sparse.linalg as cl
sys.path.insert(0, os.getcwd())
from flash_sinkhorn_hessian import solve, divergence
from flash_sinkhorn_hessian.core import random_problem
from flash_sinkhorn_hessian.linear_algebra import extreme_eigenvalues, linear_operator, newton_points, array_library
print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'cupy', cupy.__version__, flush=True)

def problem(n, m, d, dtype): return {k: t.cuda() for k, t in random_problem(n, m, d, dtype=dtype).items()}
_, _, read, write = array_library('cupy')
t = torch.arange(4., device='cuda'); c = write(t); assert c.data.ptr == t.data_ptr() and read(c).data_ptr() == t.data_ptr(); print('shared memory both ways')

bad = 0
def check(name, fn):
    global bad
    start = time.perf_counter()
    try: print('ok    ', name, fn(), f'{time.perf_counter() - start:.1f} s', flush=True)
    except Exception as e:
        import traceback; traceback.print_exc(); bad += 1; print('FAILED', name, type(e).__name__, str(e)[:500], flush=True)

def against_dense(dtype, bound, make, n=300):
    def run():
        s = make(**problem(n, 350, 3, dtype), eps=.05, tol=1e-11 if dtype == torch.float64 else None)
        H = s.hessian().double().reshape(3*n, 3*n).cpu().numpy(); w = np.linalg.eigvalsh(H); size = abs(w).max()
        op, V = linear_operator(s, xp='cupy'), cupy.random.default_rng(0).standard_normal((3*n, 4))
        e = [abs(cupy.asnumpy(op @ V) - H @ V.get()).max()/size, abs(cupy.asnumpy(op @ V[:, 0]) - H @ V[:, 0].get()).max()/size]
        e += [abs(extreme_eigenvalues(s, k=3, which=which, xp='cupy').cpu().numpy() - want).max()/size for which, want in (('SA', w[:3]), ('LA', w[-3:]))]
        d = newton_points(s, damping=2*size, tol=1e-8, xp='cupy').double().cpu().numpy().ravel()
        want = np.linalg.solve(H + 2*size*np.eye(3*n), -s.grad().double().cpu().numpy().ravel()); e.append(abs(d - want).max()/abs(want).max())
        x, info = cl.cg(cl.LinearOperator(op.shape, matvec=lambda v: op @ v + 2*size*v, dtype='float64'), V[:, 0], rtol=1e-8, atol=0.)
        want = np.linalg.solve(H + 2*size*np.eye(3*n), V[:, 0].get()); e.append(abs(x.get() - want).max()/abs(want).max()); assert info == 0
        assert max(e) < bound, e
        return 'errors: product, vector, SA, LA, newton, cg ' + ' '.join(f'{t:.1e}' for t in e)
    return run
check('float64 cost', against_dense(torch.float64, 1e-6, solve))
check('float32 cost', against_dense(torch.float32, 2e-3, solve))
check('float64 divergence', against_dense(torch.float64, 1e-6, divergence))

def copies():
    "Bytes that eigsh takes from the device to the host: the largest single copy against one vector."
    s = solve(**problem(5000, 5000, 3, torch.float32), eps=.05); e = extreme_eigenvalues(s, k=2, which='LA', xp='cupy', tol=1e-4*float(2/5000), maxiter=100)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as prof:
        start = time.perf_counter(); e = extreme_eigenvalues(s, k=2, which='LA', xp='cupy', tol=1e-4*float(2/5000), maxiter=100); torch.cuda.synchronize(); took = time.perf_counter() - start
    path = os.path.join(tempfile.mkdtemp(), 'trace.json'); prof.export_chrome_trace(path)
    events = json.load(open(path))['traceEvents']
    host = [ev['args'].get('bytes', 0) for ev in events if 'DtoH' in ev.get('name', '') or 'HtoD' in ev.get('name', '')]
    vector = 5000*3*4
    assert host and max(host) < vector/4, (len(host), max(host or [0]), vector)
    return f'eigenvalues {e.tolist()} in {took:.2f} s (under the profiler); {len(host)} copies between device and host, the largest {max(host)} bytes, together {sum(host)}; one vector has {vector}'
check('no vector visits the host', copies)

def times():
    s = solve(**problem(5000, 5000, 3, torch.float32), eps=.05); out = {}
    for xp in ('cupy', 'numpy', 'cupy', 'numpy'):
        op = linear_operator(s, xp=xp); v = (cupy if xp == 'cupy' else np).ones(15000); op @ v
        torch.cuda.synchronize(); start = time.perf_counter()
        for k in range(20): u = op @ (v + k)
        torch.cuda.synchronize(); out[xp] = (time.perf_counter() - start)/20*1e3
    return f"a product at n = 5000, d = 3: CuPy {out['cupy']:.2f} ms, SciPy {out['numpy']:.2f} ms"
check('times', times)
print('FAILURES' if bad else 'all passed', bad); sys.exit(bool(bad))
