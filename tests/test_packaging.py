"""What a stranger gets: a package that imports anywhere, whose metadata, README and archives agree with the tree."""
import re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser

import pytest

import flash_sinkhorn_hessian, readme
from pages import copy_tree
from sync import ROOT

def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def run(code, cwd, **env):
    "Run `code` in a fresh Python that finds only this package; returns what it printed."
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, env={'PATH': '', 'PYTHONPATH': str(ROOT), **env}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

def modules():
    "The package's files, as paths from the top"
    return {str(p.relative_to(ROOT)) for kind in ('*.py', '*.mplstyle') for p in (ROOT/'flash_sinkhorn_hessian').rglob(kind)}

# None in sys.modules makes an import fail as if the package were not installed.
BARE = """
import sys
for name in {blocked!r}: sys.modules[name] = None
import flash_sinkhorn_hessian
print(flash_sinkhorn_hessian.__version__)
"""

def test_imports_without_gpu_triton_jax(tmp_path):
    "The package needs PyTorch, NumPy and SciPy, whatever else its tests need."
    blocked = 'triton jax jaxlib matplotlib sklearn skimage tqdm nbdev fastcore IPython'.split()
    assert run(BARE.format(blocked=blocked), tmp_path, CUDA_VISIBLE_DEVICES='') == settings()['version']

def test_version_agrees():
    assert flash_sinkhorn_hessian.__version__ == settings()['version']
    assert f"## {settings()['version']}" in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')

def test_extras():
    assert {k for k in settings() if k.endswith('_requirements')} == {f'{o}_requirements' for o in ('dev', 'jax', 'docs', 'bench')}
    assert {re.split('[<>=]', o)[0] for o in settings()['requirements'].split()} == {'torch', 'numpy', 'scipy'}

def test_readme_agrees_with_index(capsys):
    assert readme.main(check=True) == 0, capsys.readouterr().out

def test_readme_disagreement_is_found(tmp_path, capsys):
    copy = copy_tree(ROOT, tmp_path)
    with open(copy/'README.md', 'a') as f: f.write('one more line\n')
    assert readme.main(copy, check=True) == 1
    assert '-one more line' in capsys.readouterr().out

def test_archives_hold_the_package(tmp_path):
    "The source archive, and the wheel built from it, have every module and the licence; the archive installs by itself."
    copy = copy_tree(ROOT, tmp_path)
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', tmp_path/'dist', copy], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sdist, = (tmp_path/'dist').glob('*.tar.gz')
    wheel, = (tmp_path/'dist').glob('*.whl')
    with tarfile.open(sdist) as f: inside = {o.partition('/')[2] for o in f.getnames()}
    assert modules() | {'LICENSE', 'README.md', 'settings.ini', 'setup.py'} <= inside
    with zipfile.ZipFile(wheel) as f:
        inside = set(f.namelist())
        meta = f.read(next(o for o in inside if o.endswith('METADATA'))).decode()
    assert {o for o in inside if '.dist-info' not in o} == modules()
    assert any(o.endswith('LICENSE') for o in inside)
    for line in (f"Version: {settings()['version']}", 'Requires-Python: >=3.10', 'Requires-Dist: torch>=2.5'): assert line in meta
    for extra in ('dev', 'jax', 'docs', 'bench'): assert f'Provides-Extra: {extra}' in meta

def test_star_import():
    "It brings what the package promises and no module that could hide another package."
    import types, flash_sinkhorn_hessian, flash_sinkhorn_hessian.sinkhorn
    names = {}; exec('from flash_sinkhorn_hessian import *', names); names.pop('__builtins__')
    assert {'solve', 'divergence', 'ot_cost', 'SamplesLoss', 'Solution'} <= set(names) == set(flash_sinkhorn_hessian.__all__)
    assert not [k for k, v in names.items() if isinstance(v, types.ModuleType)]
