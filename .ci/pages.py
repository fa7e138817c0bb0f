"""From notebooks to Markdown without Quarto: nbdev's processing, then nbconvert's Markdown exporter."""
import contextlib, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, yaml
from nbconvert import MarkdownExporter

from sync import LEFT_OUT, ROOT

OPTION = re.compile(r'^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$')

PROCESS = """
import sys; from nbdev.serve import proc_nbs
if __name__ == '__main__': proc_nbs(n_workers=int(sys.argv[1]), force=True)
"""

def copy_tree(root, dest):
    "Copy what a build of the documentation needs; the copy keeps the name of the folder, which nbdev looks at."
    copy = Path(dest)/Path(root).resolve().name
    shutil.copytree(root, copy, ignore=LEFT_OUT, symlinks=True)
    return copy

FENCED, LINKED = re.compile(r'^```.*?^```', flags=re.M | re.S), re.compile(r'\[(`[^`\n]+`)\]\(https?://[^)\s]+\)')

def mend(text):
    "Undo two slips of nbdev: links inside code, where they stay text, and links to a line that it did not find"
    return FENCED.sub(lambda m: LINKED.sub(r'\1', m[0]), text).replace('.py#LNone)', '.py)')

def mend_notebook(path):
    "Apply `mend` to the Markdown of a processed notebook, that of its outputs included."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = mend(cell.source)
        for data in (o.data for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})): data['text/markdown'] = mend(data['text/markdown'])
    nbformat.write(nb, path)

def process(root, workers=2):
    "Run nbdev's processors over the notebooks of the tree at `root`; returns the folder with what they wrote."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PYTHONPATH': str(root), 'MPLBACKEND': 'Agg'}
    env |= {k: '1' for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}
    # In a file, because the worker processes import the main module.
    script = Path(root)/'_process.py'
    script.write_text(PROCESS)
    done = subprocess.run([sys.executable, '-W', 'ignore', script.name, str(workers)], cwd=root, env=env, text=True, errors='replace',
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode: sys.exit(f'{done.stdout}\nnbdev could not process the notebooks')
    for p in (Path(root)/'_proc').rglob('*.ipynb'): mend_notebook(p)
    return Path(root)/'_proc'

def options(source):
    "Split a cell into its `#| key: value` options and the code below them."
    lines, opts = source.splitlines(), {}
    while lines and (m := OPTION.match(lines[0])):
        opts[m[1]] = m[2].strip('"\'')
        lines.pop(0)
    return opts, '\n'.join(lines)

def read(path):
    "Read a processed notebook: its front matter, its cells without Quarto's options, and its figures' texts and labels by cell."
    nb = nbformat.read(path, as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    front, cells, alts = {}, [], {}
    for cell in nb.cells:
        if not cell.get('source'): continue
        if cell.cell_type == 'raw' and cell.source.startswith('---'):
            front |= yaml.safe_load(cell.source.strip().strip('-')) or {}
            continue
        if cell.cell_type == 'code':
            opts, cell.source = options(cell.source)
            if opts.get('include') == 'false': continue
            if opts.get('echo') == 'false': cell.metadata['transient'] = {'remove_source': True}
            if opts.get('output') == 'false': cell.outputs = []
            label = f'{{#{opts["label"]}}}' if opts.get('label', '').startswith('fig-') else ''
            alts[len(cells)] = opts.get('fig-alt') or opts.get('fig-cap') or '', label
        cells.append(cell)
    nb.cells = cells
    return front, nb, alts

def to_markdown(path, figures='figures'):
    "The front matter, the Markdown and the figures (bytes by name) of the processed notebook at `path`"
    front, nb, alts = read(path)
    # The exporter warns of cell ids and languages that do not matter here.
    with contextlib.redirect_stderr(None):
        text, res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': figures, 'unique_key': Path(path).stem})
    def alt(m): return '![{1}]({0}){2}'.format(m[1], *alts.get(int(m[2]), ('', '')))
    text = re.sub(rf'!\[(?:png|jpeg|svg)\]\(({figures}/[^)\s]*?_(\d+)_\d+\.\w+)\)', alt, text)
    head = f'# {front["title"]}\n\n' if 'title' in front else ''
    if 'description' in front: head += f'> {front["description"]}\n\n'
    return front, head + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', res.get('outputs', {})
