"""The benchmark command: rows, files, failures that become rows, comparison of two runs."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from flash_sinkhorn_hessian.bench import cli, parser
from flash_sinkhorn_hessian.bench_report import compare
from flash_sinkhorn_hessian.bench_run import ASKED, Runner, Worker, best_ms, key, label, read
from flash_sinkhorn_hessian.bench_peers import PEERS, expand
from flash_sinkhorn_hessian.bench_tasks import ALL, SUITES, TASKS, rows_of

ROOT = Path(__file__).resolve().parent.parent

def run(*args, path=(), **env):
    "The command in a process of its own."
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(map(str, [ROOT, *path]))} | env
    return subprocess.run([sys.executable, '-m', 'flash_sinkhorn_hessian.bench', *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)

def tiny(tmp_path, command, *args):
    "A run of a few points; its document."
    out = tmp_path/f'{command}.json'
    assert cli([command, '--device', 'cpu', '--seconds', '.02', '--threads', '1', '--skip', 'floors|n=2000', '--json', str(out), *map(str, args)]) == 0
    return read(out)

@pytest.fixture(scope='module')
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp('bench')/'forward.json'
    done = run('forward', '--device', 'cpu', '--seconds', '.02', '--json', out, '--peers', 'ours', '--sizes', '60,90', '--dims', '2', '--eps', '.1', '--verify')
    assert done.returncode == 0, done.stderr[-2000:]
    return read(out), done

def test_document(first):
    doc, done = first
    assert doc['command'].startswith('python -m flash_sinkhorn_hessian.bench forward') and doc['machine']['cores'] and doc['versions']['torch'] and doc['floors']['exp2'] > 0
    rows = doc['rows'][1:]
    assert {r['task'] for r in rows} == {'half-step', 'symmetric', 'product'} and {r['n'] for r in rows} == {60, 90}
    for r in rows:
        assert r['status'] == 'ok' and r['error'] < 1e-5 and r['low_ms'] <= r['ms'] <= r['high_ms'] and r['cold_s'] > 0 and r['of_floor'] > 0 and r['how']
    assert all('half_steps' in r for r in rows if r['task'] == 'product')
    assert 'half-step n=60' in done.stdout and 'floors' in done.stdout

def test_files(tmp_path):
    doc = tiny(tmp_path, 'forward', '--peers', 'ours', '--sizes', 40, '--dims', 2, '--only', 'half-step', '--plot', tmp_path/'p.png')
    lines = (tmp_path/'forward.csv').read_text().splitlines()
    assert (tmp_path/'p.png').stat().st_size > 1000 and len(lines) == 2 and 'cold_s' in lines[0] and len(doc['rows']) == 1

def test_compare(first, tmp_path):
    doc, _ = first
    slow = json.loads(json.dumps(doc))
    for k in ('ms', 'low_ms', 'high_ms', 'cpu_ms'): slow['rows'][1][k] *= 5
    slow['rows'][2] |= dict(status='failed', note='made up')
    for name, d in (('a', doc), ('b', slow)): (tmp_path/f'{name}.json').write_text(json.dumps(d))
    assert cli(['compare', str(tmp_path/'a.json'), str(tmp_path/'a.json')]) == 0 and cli(['compare', str(tmp_path/'a.json'), str(tmp_path/'b.json')]) == 1
    verdicts = [p['verdict'] for p in compare(doc, slow)]
    assert sorted(verdicts)[:2] == ['lost', 'same'] and verdicts.count('slower') == 1 and [p['verdict'] for p in compare(slow, doc)].count('faster') == 1

def test_a_peer_that_is_not_there_and_one_that_crashes_are_rows(tmp_path, monkeypatch, capsys):
    "A stand-in for flash-sinkhorn kills its process when imported; JAX and OTT are hidden."
    for name, code in (('flash_sinkhorn', 'import os; print("about to die", flush=True); os._exit(7)'), ('ott', 'raise ImportError("hidden by the test")')):
        (tmp_path/name).mkdir(); (tmp_path/name/'__init__.py').write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    doc = tiny(tmp_path, 'forward', '--peers', 'flash:tf32,ott:lse', '--sizes', '40', '--dims', '2', '--only', 'half-step|product.*ours')
    status = {(r['task'], r['peer']): r for r in doc['rows']}; out = capsys.readouterr().out
    assert status['half-step', 'flash:tf32']['status'] == 'crashed' and 'exit code 7' in status['half-step', 'flash:tf32']['note'] and 'about to die' in status['half-step', 'flash:tf32']['note']
    assert status['half-step', 'ott:lse']['status'] == 'missing' and status['half-step', 'ours']['status'] == status['product', 'ours']['status'] == 'ok'
    assert 'missing' in out and 'crashed' in out

LIAR = '''
import sys, types, torch
def potentials(x, y, *args, **kw): return torch.zeros(len(x)), torch.zeros(len(y))
wrong = lambda *args, **kw: potentials(*args)
for name, entries in dict(sinkhorn_solvers=["sinkhorn_flashstyle_alternating", "sinkhorn_flashstyle_symmetric"], kernels=[],
        **{"kernels.sinkhorn_flashstyle_sqeuclid": ["flashsinkhorn_symmetric_step"], "kernels.apply_flash": ["apply_plan_mat_flashstyle"], "kernels._common": ["epsilon_schedule", "max_diameter"]}).items():
    m = sys.modules["flash_sinkhorn." + name] = types.ModuleType(name); vars(m).update({e: wrong for e in entries})
'''

def test_a_peer_that_is_fast_and_wrong_gets_no_time(tmp_path, monkeypatch, capsys):
    "A stand-in for flash-sinkhorn answers zeros at once: with --verify its row has no time, without it the row is there and not ahead."
    stand_in(tmp_path, monkeypatch, LIAR)
    asked = ('forward', '--peers', 'flash:tf32', '--sizes', '400', '--dims', '2', '--eps', '.01', '--only', 'half-step')
    ours, liar = tiny(tmp_path, *asked, '--verify', '.01')['rows']; out = capsys.readouterr().out
    assert liar['status'] == 'wrong' and best_ms(liar) is None and liar['error'] > .01 and best_ms(ours) and 'no time is given' in out
    ours, liar = tiny(tmp_path, *asked)['rows']; out = capsys.readouterr().out
    assert best_ms(liar) and '1 row without a time or off by more' in out and 'ahead:' not in out

def stand_in(tmp_path, monkeypatch, code):
    (tmp_path/'flash_sinkhorn').mkdir(); (tmp_path/'flash_sinkhorn'/'__init__.py').write_text(code); monkeypatch.syspath_prepend(str(tmp_path))

def test_a_peer_that_hangs_is_cut_off(tmp_path, monkeypatch):
    "While it is imported, and in a search: the row says what the search had found. The rows of this package are there all the same."
    asked = ('--peers', 'flash:float32', '--sizes', '60', '--dims', '2', '--eps', '.1', '--only', 'marginal', '--timeout', '3')
    stand_in(tmp_path, monkeypatch, LIAR.replace('wrong = lambda *args, **kw: potentials(*args)', 'def wrong(*args, **kw): time.sleep(60*(not isinstance(args[0], torch.Tensor))); return potentials(*args)').replace('import sys', 'import time, sys'))
    ours, late = tiny(tmp_path, 'solve', *asked)['rows']
    assert best_ms(ours) and late['status'] == 'timed out' and 'killed after 3 s; so far: best ' in late['note'] and '32 alternating iterations' in late['note'], late
    (tmp_path/'flash_sinkhorn'/'__init__.py').write_text('import time; time.sleep(60)'); monkeypatch.setattr(Worker, 'START', 4)
    file = tmp_path/'solve.json'; doc = read(file); file.write_text(json.dumps(doc | dict(rows=doc['rows'][:1])))      # the row of this package is there already
    ours, late = tiny(tmp_path, 'solve', *asked, '--resume')['rows']
    assert best_ms(ours) and late['status'] == 'timed out' and 'of starting' in late['note']

def test_kernels_compiled_beforehand_and_a_run_that_goes_on(tmp_path, monkeypatch):
    "Two processes share the tiles of a library; a second run with one more library keeps the rows of the first."
    stand_in(tmp_path, monkeypatch, LIAR); asked = ('forward', '--sizes', '40', '--dims', '2', '--only', 'half-step')
    ours, flash = tiny(tmp_path, *asked, '--peers', 'flash:tf32', '--prewarm', '2')['rows']
    assert flash['status'] == 'ok' and flash['cold_s'] is None and flash['cached_s'] > 0 and ours['cold_s'] > 0 and 'share' not in flash
    again = tiny(tmp_path, *asked, '--peers', 'flash:tf32,flash:float32', '--resume')['rows']
    assert again[:2] == [ours, flash] and [r['peer'] for r in again] == ['ours', 'flash:tf32', 'flash:float32']

def test_interrupted(tmp_path):
    "Ctrl-C in the middle of a row (one that takes many seconds at this size): the rows before it are in the file, the exit status says so, and --resume does the rest."
    argv = ['forward', '--device', 'cpu', '--peers', 'ours', '--sizes', '2000', '--dims', '2', '--only', 'half-step|symmetric', '--json', str(tmp_path/'a.json')]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    p = subprocess.Popen([sys.executable, '-m', 'flash_sinkhorn_hessian.bench', *argv, '--seconds', '1000'], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))          # a shell's background job ignores it, and hands that on
    while p.poll() is None and not (tmp_path/'a.json').exists(): time.sleep(.05)   # after the floors
    time.sleep(.3); p.send_signal(signal.SIGINT); out, _ = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Interrupted; --resume goes on' in out and 'Traceback' not in out, out[-2000:]
    assert [r['task'] for r in read(tmp_path/'a.json')['rows']] == ['floors']
    again = subprocess.run([sys.executable, '-m', 'flash_sinkhorn_hessian.bench', *argv, '--seconds', '.02', '--resume'], cwd=ROOT, env=env, capture_output=True, text=True)   # as many threads
    assert again.returncode == 0, again.stdout[-1000:] + again.stderr[-1000:]
    assert [(r['task'], r['status']) for r in read(tmp_path/'a.json')['rows']] == [(t, 'ok') for t in ('floors', 'half-step', 'symmetric')]

def test_slow_rows_and_a_spent_budget(tmp_path):
    document = dict(rows=[], versions={})
    r = dict(suite='hvp', task='half-step', peer='ours', n=3000, d=2, eps=.1, iterations=3, device='cpu', dtype='float32')
    runner = Runner(document, tmp_path/'x.json', timeout=.5, seconds=20)
    try: assert runner.one(r)['status'] == 'timed out' and len(read(tmp_path/'x.json')['rows']) == 1
    finally: runner.close()
    late = Runner(document, budget=0.)
    assert late.one(r)['status'] == 'not run' and 'budget' in document['rows'][-1]['note']

def test_a_wrong_answer_has_no_time(tmp_path):
    doc = tiny(tmp_path, 'backward', '--peers', 'ours', '--sizes', '50', '--dims', '2', '--eps', '.1', '--verify', '1e-13')
    r = doc['rows'][0]
    assert r['status'] == 'wrong' and best_ms(r) is None and 'no time' in r['note'] and r['error'] > 1e-13

def test_second_order_and_solve(tmp_path):
    one, first, many = tiny(tmp_path, 'hvp', '--peers', 'ours', '--sizes', '60', '--dims', '2', '--eps', '.1')['rows']
    assert one['error'] < 1e-4 and one['after'] == 12 and first['task'] == 'first hvp' and first['error'] < 1e-4 and many['k'] == 16 and many['status'] == 'ok' and 'cg' in one
    rows = tiny(tmp_path, 'solve', '--peers', 'ours', '--sizes', '60', '--dims', '2', '--eps', '.1')['rows']
    assert [r['quantity'] for r in rows] == ['marginal', 'gradient', 'hvp'] and all(r['error'] <= r['target'] and best_ms(r) for r in rows)

def test_hessian_memory_and_cold(tmp_path):
    assert tiny(tmp_path, 'hessian', '--peers', 'ours', '--sizes', '12', '--dims', '2', '--dtype', 'float64')['rows'][0]['error'] < 1e-7
    row = tiny(tmp_path, 'memory', '--peers', 'ours', '--sizes', '100', '--dims', '2')['rows'][0]
    assert row['fresh_process'] and row['status'] == 'ok'
    row = tiny(tmp_path, 'cold', '--peers', 'ours', '--sizes', '1100')['rows'][0]
    assert row['cold_s'] > 0 and row['ms'] > 0

def test_scaling_plot(tmp_path):
    doc = tiny(tmp_path, 'scaling', '--peers', 'ours', '--sizes', '50,100,200', '--dims', '1,2', '--eps', '1,.1', '--only', 'half-step')
    assert [r['n'] for r in doc['rows']] == [50, 100, 200] and (tmp_path/'scaling.png').stat().st_size > 1000

@pytest.mark.parametrize('argv, says', [(['forward', '--peers', 'keops'], 'peers must be among'), (['forward', '--peers', 'pot:fast'], 'modes'), (['compare', 'a.json'], 'two files'),
                                        (['forward', 'a.json'], 'takes no files'), (['forward', '--only', 'nothing'], 'no row is left'), (['forwards'], 'a command is one of'),
                                        (['forward', '--json', '/dev/null/a.json'], '--json /dev/null/a.json'), (['forward', '--csv', '/dev/null/a.csv'], '--csv /dev/null/a.csv'), (['compare', 'no.json', 'no.json'], 'no.json'), (['compare', 'nbs/results/cpu_hvp.json', 'nbs/results/cpu_solve.json'], 'no row in common'), (['forward', '--plot', '/tmp/a.tex9'], '--plot /tmp/a.tex9')])
def test_bad_input(argv, says, capsys):
    assert cli(argv) == 2 and says in capsys.readouterr().err

@pytest.mark.parametrize('argv', [['--sizes', 'ten'], ['--sizes', '0'], ['--eps', '-1'], ['--only', '('], ['--limit', 'flash'], ['--budget', '0'], ['--threads', 'many'], ['--dtype', 'half']])
def test_bad_argument(argv, capsys):
    with pytest.raises(SystemExit) as e: cli(['forward', *argv])
    assert e.value.code == 2 and f'argument {argv[0]}' in capsys.readouterr().err

def test_bad_file(tmp_path, capsys):
    (tmp_path/'x.json').write_text('[1]')
    assert cli(['compare', str(tmp_path/'x.json'), str(tmp_path/'x.json')]) == 2 and 'no rows' in capsys.readouterr().err

def test_rows():
    "Every suite names tasks and peers that exist; keys are unique; selections keep what they should."
    peers = expand(PEERS)
    for device in ('cpu', 'cuda'):
        for suite in SUITES:
            rows = rows_of(suite, peers, dict(device=device))
            assert all(r['task'] in TASKS for r in rows) and len({key(r) for r in rows}) == len(rows), suite
            assert any(r['peer'] == 'ours' for r in rows) and all(label(r) for r in rows if r['task'] != 'floors')
        assert {r['suite'] for r in rows_of('all', peers, dict(device=device))} == {*ALL, 'floors'}
    assert 'peer' == ASKED[-1] and parser().parse_args(['all', '--budget', '9']).budget == 9

def test_the_package_needs_no_peer():
    "Import of the package and of the harness loads no peer, no Triton, no JAX, no matplotlib."
    code = ('import sys, flash_sinkhorn_hessian, flash_sinkhorn_hessian.bench, flash_sinkhorn_hessian.bench_clock, flash_sinkhorn_hessian.bench_peers, flash_sinkhorn_hessian.bench_tasks; '
            'bad = {"jax", "ott", "ot", "geomloss", "flash_sinkhorn", "triton", "matplotlib", "rich"} & set(sys.modules); print(bad); sys.exit(bool(bad))')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]
