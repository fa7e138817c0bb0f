"""Draw the saved figures of some notebooks again, after a change of style: run each and replace its images, nothing else.

Cells flagged `#| slow` or `#| cuda` are not run and keep what they have, and so do outputs without an image. A tutorial opens with
its last figure, from a file in nbs/images: that is written again, too (`--tops`: nothing else).
"""
import argparse, os, re, sys
from base64 import b64decode
from io import BytesIO
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

def last_figure(path):
    "The last saved figure of the notebook at `path`, as an image, or None"
    from PIL import Image
    found = [o.data['image/png'] for c in nbformat.read(path, as_version=4).cells for o in c.get('outputs', []) if image(o)]
    return Image.open(BytesIO(b64decode(found[-1]))).convert('RGB') if found else None

def top(path):
    "The file of the picture that the notebook at `path` opens with, or None"
    m = re.search(r'!\[[^]]*\]\((\.\./images/[^)]+)\)', '\n'.join(c.source for c in nbformat.read(path, as_version=4).cells[:4] if c.cell_type == 'markdown'))
    return (path.parent/m[1]).resolve() if m else None

def write_top(path, width=900):
    "Write the picture that a tutorial opens with: its last figure, at most `width` pixels wide; returns whether there is one."
    picture, file = last_figure(path), top(path)
    if picture is None or file is None: return False
    if picture.width > width: picture = picture.resize((width, round(width*picture.height/picture.width)), 1)
    if file.suffix == '.png': picture.quantize(255, dither=0).save(file, optimize=True)
    else: picture.save(file, quality=88)
    return True

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('only', nargs='+', help='notebooks whose path contains one of these')
    parser.add_argument('--tops', action='store_true', help="only the pictures at the top, from the figures as they are saved")
    args = parser.parse_args()
    found = notebooks(ROOT, args.only) or sys.exit('No notebook to draw.')
    os.environ['PYTHONPATH'] = str(ROOT)
    for p in found:
        if not args.tops: print(f'{p.relative_to(ROOT)}: {redraw(p)} cells with figures', flush=True)
        if p.parent.name == 'tutorials' and write_top(p): print(f'{p.relative_to(ROOT)}: wrote {top(p).name}', flush=True)
