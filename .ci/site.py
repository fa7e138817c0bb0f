"""Build the site into _docs: nbdev's processing in a copy of the tree, then Quarto. README.md is left alone. A warning is a failure."""
import re, shutil, subprocess, sys, tempfile
from pathlib import Path

from pages import ROOT, copy_tree, process

# Quarto's own warnings, pandoc's, and those of Lua filters; colours of a terminal may stand before the word.
WARNING = re.compile(r'^(\x1b\[[\d;]*m)*(\[?(WARN|WARNING|ERROR)\b|\(W\))')

def render(command, cwd):
    "Run Quarto and show what it says; returns the lines that are warnings."
    found = []
    with subprocess.Popen(command, cwd=cwd, text=True, errors='replace', stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        for line in run.stdout:
            print(line, end='', flush=True)
            if WARNING.match(line.strip()): found.append(line.strip())
    if run.returncode: sys.exit(f'Quarto failed with exit code {run.returncode}')
    return found

def main(root=ROOT):
    "Render the site of the tree at `root`."
    if not shutil.which('quarto'):
        sys.exit('Quarto is not on the PATH (https://quarto.org/docs/get-started); `make docs-check` checks the pages without it.')
    with tempfile.TemporaryDirectory() as tmp:
        built = process(copy_tree(root, tmp))
        found = render(['quarto', 'render', '--no-cache', '--no-execute', '--to', 'html'], built)
        shutil.rmtree(Path(root)/'_docs', ignore_errors=True)
        shutil.move(built/'_docs', Path(root)/'_docs')
    if found: sys.exit('\n'.join([f'The site is in _docs, but Quarto warned {len(found)} times:', *found]))
    print('The site is in _docs: open _docs/index.html.')

if __name__ == '__main__': main()
