"""Build the site into _docs: nbdev's processing in a copy of the tree, then Quarto. README.md is left alone."""
import shutil, subprocess, sys, tempfile
from pathlib import Path

from pages import ROOT, copy_tree, process

def main(root=ROOT):
    "Render the site of the tree at `root`."
    if not shutil.which('quarto'):
        sys.exit('Quarto is not on the PATH (https://quarto.org/docs/get-started); `make docs-check` checks the pages without it.')
    with tempfile.TemporaryDirectory() as tmp:
        built = process(copy_tree(root, tmp))
        subprocess.run(['quarto', 'render', '--no-cache', '--no-execute', '--to', 'html'], cwd=built, check=True)
        shutil.rmtree(Path(root)/'_docs', ignore_errors=True)
        shutil.move(built/'_docs', Path(root)/'_docs')
    print('The site is in _docs: open _docs/index.html.')

if __name__ == '__main__': main()
