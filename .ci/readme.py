"""Write README.md from nbs/index.ipynb, or fail with `--check` if the two disagree."""
import argparse, difflib, re, sys, tempfile
from pathlib import Path

from pages import ROOT, copy_tree, process, to_markdown

FIGURES = 'images'

def outside_code(text, change):
    "Apply `change` to the parts of the Markdown `text` that are not fenced code."
    return ''.join(part if part.startswith('```') else change(part) for part in re.split(r'(^```.*?^```$)', text, flags=re.M | re.S))

def from_top(text):
    "Links and images that are relative to nbs/, made relative to the top of the repository"
    def move(m): return m[1] + ('nbs/' + m[2]).replace('nbs/../', '')
    return outside_code(text, lambda part: re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)', move, part))

def build(root=ROOT):
    "README.md and the index notebook's figures, by path, as they should be"
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_tree(root, tmp)
        # Only the index is wanted, and links to symbols are looked up in the package: spare the other notebooks.
        for p in (copy/'nbs').rglob('*.ipynb'):
            if p != copy/'nbs'/'index.ipynb': p.unlink()
        _, text, figures = to_markdown(process(copy, 0)/'index.ipynb', FIGURES)
    return {'README.md': from_top(text)} | {f'nbs/{name}': data for name, data in figures.items()}

def main(root=ROOT, check=False):
    "Write or compare the files; returns the number that disagree."
    wrong = 0
    for name, want in build(root).items():
        path, want = Path(root)/name, want.encode() if isinstance(want, str) else want
        have = path.read_bytes() if path.exists() else b''
        if have == want: continue
        if check:
            wrong += 1
            lines = [o.decode(errors='replace').splitlines() for o in (have, want)] if path.suffix == '.md' else ([], [])
            print(f'{name} and nbs/index.ipynb disagree: run `make readme`.', *difflib.unified_diff(*lines, 'as it is', 'as it should be', lineterm=''), sep='\n')
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(want)
            print('wrote', name)
    return wrong

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='compare only')
    parser.add_argument('--root', type=Path, default=ROOT)
    args = parser.parse_args()
    sys.exit(main(args.root.resolve(), args.check) > 0)
