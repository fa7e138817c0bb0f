"""`make test` must fail when it should: a stale module, a hand-written module, an uncleaned notebook, a failing cell."""
import re, sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest, yaml

import figures, nbtest, sync
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

def test_the_sidebar_has_sections_and_loses_nothing(tmp_path):
    flat = ['00_a.ipynb', '12_b.ipynb', '31_c.ipynb', 'index.ipynb', 'reference.ipynb']
    (tmp_path/'nbs').mkdir()
    (tmp_path/'nbs'/'sidebar.yml').write_text('website:\n  sidebar:\n    contents:\n' + ''.join(f'      - {o}\n' for o in flat)
                                              + '      - section: tutorials\n        contents:\n          - tutorials/01_t.ipynb\n')
    sync.arrange(tmp_path)
    contents = yaml.safe_load((tmp_path/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']
    assert contents[:2] == ['index.ipynb', 'reference.ipynb'] and contents[2] == {'section': 'Tutorials', 'contents': ['tutorials/01_t.ipynb']}
    assert [o['contents'] for o in contents[3:]] == [['00_a.ipynb'], ['12_b.ipynb'], ['31_c.ipynb']]

@pytest.mark.parametrize('line, bad', [('WARN: Unable to resolve link target: x.ipynb', True), ('\x1b[33mWARNING: x\x1b[39m', True), ('[WARNING] Could not convert TeX math', True),
                                       ('(W) filter.lua: x', True), ('[ 1/44] core.ipynb', False), ('Output created: _docs/index.html', False)])
def test_a_warning_of_quarto_fails_the_site(line, bad):
    spec = spec_from_file_location('ci_site', sync.ROOT/'.ci'/'site.py')     # Python has a `site` of its own
    spec.loader.exec_module(ours := module_from_spec(spec))
    assert ours.render([sys.executable, '-c', f'print({line!r})'], '.') == ([line] if bad else [])
    with pytest.raises(SystemExit): ours.render([sys.executable, '-c', 'raise SystemExit(3)'], '.')

TUTORIALS = sorted((sync.ROOT/'nbs'/'tutorials').glob('[0-9]*_*.ipynb'))

def test_every_tutorial_is_in_the_gallery():
    text = (sync.ROOT/'nbs'/'tutorials'/'00_gallery.ipynb').read_text(encoding='utf-8')
    for p in TUTORIALS[1:]: assert text.count(f']({p.name})') >= 2, f'{p.name}: a tile wants its picture and its title'
    pictures = set(re.findall(r'\(\.\./images/([^)]+)\)', text))
    assert len(pictures) == len(TUTORIALS) - 1 and all((sync.ROOT/'nbs'/'images'/o).is_file() for o in pictures)

@pytest.mark.parametrize('path', [p for p in TUTORIALS[1:] if figures.top(p)], ids=lambda p: p.stem)
def test_a_tutorial_opens_with_the_picture_it_ends_with(path):
    "The file in nbs/images is the last saved figure, up to its size and compression."
    import numpy as np
    from PIL import Image
    a, b = (np.asarray(o.convert('L').resize((160, 90), 1), float) for o in (Image.open(figures.top(path)), figures.last_figure(path)))
    assert abs(a - b).mean() < 4, f'{figures.top(path).name} is stale: run .ci/figures.py --tops {path.stem}'
