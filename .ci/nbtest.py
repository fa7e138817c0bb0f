"""Run every notebook's inline tests, each notebook in a process of its own, `--workers` at a time.

A process each: one notebook's default dtype, seed or monkey patch must not reach the next. They are forked from one
that has imported PyTorch and the like, which takes three seconds a notebook. Cells flagged `#| slow`
or `#| cuda` are skipped unless named in `--flags`; `cuda` is added by itself where PyTorch sees a GPU.
"""
import argparse, functools, multiprocessing.forkserver, os, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from quick import interpreter, xla

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = 'nbdev.test', 'nbdev.showdoc', 'torch', 'scipy.sparse.linalg', 'matplotlib.pyplot'    # what nearly every notebook imports, and nothing of this package

def notebooks(root, only=()):
    "The notebooks under nbs/ of the tree at `root`, or those whose path contains one of `only`"
    found = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(root).parts)]
    return [p for p in found if not only or any(o in str(p.relative_to(root)) for o in only)]

@functools.lru_cache(maxsize=1)
def has_gpu():
    "Whether PyTorch sees a GPU, asked of another process so that this one stays small"
    code = 'import sys, torch; sys.exit(not torch.cuda.is_available())'
    return not subprocess.run([sys.executable, '-c', code], stderr=subprocess.DEVNULL).returncode

def server(root, threads):
    "A process that has imported what takes long and forks when a notebook is to be run."
    ways, before = multiprocessing.get_context('forkserver'), dict(os.environ); ways.set_forkserver_preload(list(PRELOAD))
    os.environ.update(xla() | before | {'PYTHONPATH': str(root), 'IN_TEST': '1', 'MPLBACKEND': 'Agg'})
    os.environ.update({k: str(threads) for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')})
    try: multiprocessing.forkserver.ensure_running()
    finally: os.environ.clear(); os.environ.update(before)
    return ways

def child(path, root, flags, threads, log):
    "In a process of its own: run one notebook. All that it prints goes into a file."
    out = os.open(log, os.O_WRONLY | os.O_APPEND); os.dup2(out, 1); os.dup2(out, 2)
    os.chdir(root); os.environ['PYTHONPATH'] = str(root); sys.path.insert(0, str(root))
    import torch; from nbdev.config import get_config; from nbdev.test import test_nb
    if 'TRITON_INTERPRET' in path.read_text() and not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'; interpreter()    # before Triton is imported
    torch.set_num_threads(threads); cfg = get_config(path='.')
    passed, _ = test_nb(path, skip_flags=cfg.tst_flags.split(), force_flags=list(flags), basepath=cfg.config_path)
    sys.exit(not passed)

def run_notebook(ways, path, root, flags, threads, timeout):
    "Run one notebook; returns its path, whether it passed, the seconds it took and what it printed."
    start = time.time()
    with tempfile.NamedTemporaryFile() as log:
        run = ways.Process(target=child, args=(path, root, flags, threads, log.name)); run.start(); run.join(timeout)
        if late := run.is_alive(): run.kill(); run.join()
        text = Path(log.name).read_text(errors='replace') + f'\nstopped after {timeout} s'*late
    return path, run.exitcode == 0, time.time() - start, text

def main(root=ROOT, only=(), workers=2, flags=(), timeout=300):
    "Run the notebooks, report each as it ends, and return 1 if any failed or none was found."
    nbs = notebooks(root, only)
    if not nbs: return print('No notebook to test.') or 1
    flags = [*flags, *(['cuda'] if 'cuda' not in flags and has_gpu() else [])]
    threads = max(1, (os.cpu_count() or 1) // workers)
    print(f'Testing {len(nbs)} notebooks, {workers} at a time, {threads} thread(s) each, flags: {" ".join(flags) or "none"}', flush=True)
    failed, start, ways = [], time.time(), server(root, threads)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run_notebook, ways, p, root, flags, threads, timeout) for p in reversed(nbs)]    # the first notebooks are the shortest: at the end no worker waits long for the other
        for i, job in enumerate(as_completed(jobs), 1):
            path, passed, seconds, text = job.result()
            name = path.relative_to(root)
            print(f'[{i}/{len(nbs)}] {"passed" if passed else "FAILED"} {name} in {seconds:.1f} s', flush=True)
            if not passed: failed.append(name); print(text, flush=True)
    print(f'{len(nbs) - len(failed)} of {len(nbs)} notebooks passed in {time.time() - start:.0f} s')
    if failed: print('Failed:', *failed, sep='\n  ')
    return int(bool(failed))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('only', nargs='*', help='run only the notebooks whose path contains one of these')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--flags', default='', help='flags to run that are skipped by default, such as "slow cuda"')
    parser.add_argument('--timeout', type=float, default=300, help='seconds allowed a notebook')
    parser.add_argument('--root', type=Path, default=ROOT)
    args = parser.parse_args()
    sys.exit(main(args.root.resolve(), args.only, args.workers, args.flags.split(), args.timeout))
