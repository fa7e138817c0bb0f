"""Draw the saved figures of some notebooks again, after a change of style: run each and replace its images, nothing else.

Cells flagged `#| slow` or `#| cuda` are not run and keep what they have, and so do outputs without an image.
"""
import argparse, os, re, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from nbtest import ROOT, notebooks

SKIPPED = re.compile(r'^#\|\s*(slow|cuda)\b', flags=re.M)

def image(out): return 'image/png' in out.get('data', {})

def redraw(path, timeout=300):
    "Run the notebook at `path` and replace the images of its cells; returns how many cells have new ones."
    text = path.read_text(encoding='utf-8')
    nb, done = nbformat.reads(text, as_version=4), nbformat.reads(text, as_version=4)
    for cell in done.cells:
        if cell.cell_type == 'code' and SKIPPED.search(cell.source): cell.cell_type, cell.source = 'raw', ''
    NotebookClient(done, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    drawn = [(old, [o for o in new.outputs if image(o)]) for old, new in zip(nb.cells, done.cells) if new.cell_type == 'code']
    drawn = [(old, new) for old, new in drawn if new]
    for old, new in drawn: old.outputs = [o for o in old.outputs if not image(o)] + new
    nbformat.write(nb, path)
    return len(drawn)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('only', nargs='+', help='notebooks whose path contains one of these')
    args = parser.parse_args()
    found = notebooks(ROOT, args.only) or sys.exit('No notebook to draw.')
    os.environ['PYTHONPATH'] = str(ROOT)
    for p in found: print(f'{p.relative_to(ROOT)}: {redraw(p)} cells with figures', flush=True)
