"""`make test` must fail when it should: a stale module, a hand-written module, an uncleaned notebook, a failing cell."""
import re

import pytest, yaml

import nbtest, sync
from pages import copy_tree
from test_docs_check import write

TOY = '# Toy', '>>>#| default_exp toy', '>>>#| export\ndef double(x): return 2*x', '>>>assert double(2) == 4', '>>>#| slow\nassert False', '>>>#| cuda\nassert False'

@pytest.fixture
def tree(tmp_path):
    "A copy of the tree with one small notebook, exported and cleaned, in place of its own"
    copy = copy_tree(sync.ROOT, tmp_path)
    for p in [*(copy/'nbs').rglob('*.ipynb'), *(copy/'flash_sinkhorn_hessian').rglob('*.py')]: p.unlink()
    (copy/'flash_sinkhorn_hessian'/'__init__.py').write_text('__version__ = "0.1.0"\n')
    write(copy/'nbs'/'00_toy.ipynb', *TOY)
    sync.nbdev(sync.EXPORT + sync.CLEAN, copy)
    return copy

def test_agreement_is_seen_and_the_tree_left_alone(tree):
    before = sync.snapshot(tree)
    assert sync.check(tree) == 0 and sync.snapshot(tree) == before

def test_every_disagreement_is_seen(tree, capsys):
    lib = tree/'flash_sinkhorn_hessian'
    module = (lib/'toy.py').read_text()
    (lib/'toy.py').write_text(module.replace('2*x', '3*x'))
    (lib/'old.py').write_text(module)
    (lib/'mine.py').write_text('x = 1\n')
    text = (tree/'nbs'/'00_toy.ipynb').read_text()
    (tree/'nbs'/'00_toy.ipynb').write_text(text.replace('"execution_count": null', '"execution_count": 7', 1))
    assert sync.check(tree) == 1
    out = capsys.readouterr().out
    for said in ('-def double(x): return 3*x', 'old.py (as it is)', 'mine.py', '"execution_count": 7'): assert said in out, said

def test_a_failing_cell_fails_the_run(tree, capsys):
    assert nbtest.main(tree, workers=1) == (1 if nbtest.has_gpu() else 0)
    write(tree/'nbs'/'tutorials'/'bad.ipynb', '# Bad', '>>>assert 1 == 2')
    assert nbtest.main(tree, only=['bad']) == 1
    assert 'AssertionError' in capsys.readouterr().out
    assert nbtest.main(tree, only=['toy'], flags=['slow']) == 1
    assert nbtest.main(tree, only=['no such notebook']) == 1

@pytest.mark.parametrize('path', sorted((sync.ROOT/'.github'/'workflows').glob('*.yml')), ids=lambda p: p.stem)
def test_workflows_call_what_is_there(path):
    "They parse, ask for no more rights than they state, have a time limit, and run scripts and targets of this tree."
    flow = yaml.safe_load(path.read_text(encoding='utf-8'))
    targets = re.findall(r'^([a-z-]+):', (sync.ROOT/'Makefile').read_text(encoding='utf-8'), flags=re.M)
    assert flow['permissions'] and flow['jobs']
    for job in flow['jobs'].values():
        assert job['timeout-minutes'] <= 60
        for step in job['steps']:
            assert ('uses' in step) != ('run' in step) and re.fullmatch(r'[\w./-]+@v\d+', step.get('uses', 'a@v1'))
            what, name = step.get('run', 'make env').split()
            assert name in targets if what == 'make' else (sync.ROOT/name).is_file()
