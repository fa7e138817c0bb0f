"""The documentation's check must find what it is there to find: each fault is planted, one at a time."""
import nbformat, pytest, yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from docs_check import check_pages, check_site, output_problems, parse, title_problems, unknown_keys
from pages import copy_tree, mend
from readme import from_top
from sync import ROOT

HOME, SOURCE = 'https://me.example/lib', 'https://git.example/me/lib/blob/main/'
GOOD = {
    'core.html': '# Core\n\n## The dual energy\n\n$\\sum_j P_{ij} = a_i$ and\n\n$$D(f, g) = \\langle a, f\\rangle$$ {#eq-dual}\n\n```python\ncost = "$5"\n```\n',
    'tutorials/a.html': '# A\n\n[up](../00_core.ipynb#the-dual-energy), [page](../core.html), [here](#a), [site](https://me.example/lib/core.html#core), '
                        '[file](https://git.example/me/lib/blob/main/lib/core.py#L3), [away](https://other.example/x), @eq-dual\n\n![a plot](../images/p.png)\n',
}

@pytest.fixture
def check(tmp_path):
    "Check the good pages with the text of one of them added to; returns what is wrong."
    site = tmp_path/'site'
    for p in (tmp_path/'lib'/'core.py', tmp_path/'outside.png', site/'images'/'p.png'):
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(b'')
    def f(more='', page='tutorials/a.html'):
        texts = GOOD | {page: GOOD[page] + '\n' + more}
        return check_pages(texts, site, {'00_core.ipynb': 'core.html'}, HOME, SOURCE, tmp_path)[1]
    return f

def test_good_pages_pass(check): assert check() == []

@pytest.mark.parametrize('fault, said', [
    ('[x](../nothing.html)', 'broken link: ../nothing.html'),
    ('[x](../01_nothing.ipynb)', 'broken link: ../01_nothing.ipynb'),
    ('[x](core.html)', 'broken link: core.html'),
    ('[x](https://me.example/lib/nothing.html)', 'broken link: https://me.example/lib/nothing.html'),
    ('[x](../core.html#nothing)', 'broken anchor: ../core.html#nothing'),
    ('[x](../00_core.ipynb#nothing)', 'broken anchor'),
    ('[x](#nothing)', 'broken anchor: #nothing'),
    ('[x](https://me.example/lib/core.html#box.twice)', 'show_doc(Class.method)'),
    ('[x](https://git.example/me/lib/blob/main/lib/nothing.py#L3)', 'source link to a file that is not there: lib/nothing.py'),
    ('[x](../../lib/core.py)', 'outside the site'),
    ('<a href="../nothing.html">x</a>', 'broken link'),
    ('![x](../images/nothing.png)', 'missing image: ../images/nothing.png'),
    ('![x](images/p.png)', 'missing image: images/p.png'),
    ('![x](../../outside.png)', 'missing image'),
    ('<img src="../images/nothing.png" alt="x">', 'missing image'),
    ('text and ![](../images/p.png)', 'image without a text'),
    ('[[`double`](../core.html#core)](../core.html)', 'link left as text'),
    ('![x](https://other.example/p.png)', 'fetched from another server'),
    ('see @eq-nothing', 'broken cross-reference: @eq-nothing'),
    ('$\\frac{1}{2$', 'TeX math'),
    ('$$\\left( x$$', 'unbalanced'),
    ('$\\nosuchcommand{x}$', 'TeX math'),
    ('a formula $ x + y $ with spaces', 'formula left as text'),
    ('a formula \\(x\\) in brackets, $\\alpha', 'formula left as text'),
    ('::: {.callout-note}\nnever closed', 'unclosed'),
])
def test_planted_fault_is_found(check, fault, said):
    found = check(fault)
    assert len(found) >= 1 and any(said in o for o in found), found
    assert all(o.startswith('tutorials/a.html: ') for o in found)

def test_dollars_in_code_are_not_formulas():
    page = parse('<p><code>$x$</code></p><pre>\\alpha</pre><p>plain</p>')
    assert page.leftover == [] and page.formulas == []

def test_links_inside_code_are_undone():
    text = 'a [`f`](https://x.example/a.html#f)\n\n```python\ndef g(\n    x, # see [`f`](https://x.example/a.html#f)\n)\n```\n[source](https://x.example/a.py#LNone)'
    assert mend(text) == text.replace('see [`f`](https://x.example/a.html#f)', 'see `f`').replace('#LNone', '')

def write(path, *cells):
    "Write a small notebook; a cell is Markdown if it opens with `# ` or a letter and a space, and code if it opens with `>>>`."
    cells = [new_code_cell(o[3:]) if o.startswith('>>>') else new_markdown_cell(o) for o in cells]
    for i, c in enumerate(cells): c['id'] = f'{i:08x}'
    nbformat.write(new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3'}}), path)

def test_title_cell_keeps_only_the_title(tmp_path):
    write(tmp_path/'a.ipynb', '# A\n\n> What it shows\n\n- toc: true', 'text')
    assert title_problems(tmp_path/'a.ipynb', 'a') == []
    write(tmp_path/'a.ipynb', '# A\n\n> What it shows\n\nText that nbdev drops.')
    assert 'would be lost' in title_problems(tmp_path/'a.ipynb', 'a')[0]
    write(tmp_path/'a.ipynb', 'no title')
    assert 'no "# Title" cell' in title_problems(tmp_path/'a.ipynb', 'a')[0]

@pytest.mark.parametrize('out, said', [
    (new_output('stream', name='stdout', text='1'), None), (new_output('display_data', {'image/png': '', 'text/plain': 'x'}), None),
    (new_output('stream', name='stderr', text='warned'), 'stderr'), (new_output('display_data', {'text/html': '<b>x</b>'}), 'text/html'),
    (new_output('display_data', {'image/png': 'x'*400_000}), '390 KB of saved outputs'),
])
def test_outputs_need_no_other_server(tmp_path, out, said):
    nbformat.write(new_notebook(cells=[new_code_cell('1', outputs=[out])]), tmp_path/'a.ipynb')
    found = output_problems(tmp_path/'a.ipynb', 'a')
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])

@pytest.fixture
def tree(tmp_path):
    "A copy of the tree with two small notebooks in place of its own"
    copy = copy_tree(ROOT, tmp_path)
    for p in (copy/'nbs').rglob('*.ipynb'): p.unlink()
    for p in copy.glob('*.md'): p.unlink()
    (copy/'flash_sinkhorn_hessian'/'__init__.py').write_text('__version__ = "0"')
    (copy/'nbs'/'sidebar.yml').write_text('website:\n  sidebar:\n    contents:\n      - 00_toy.ipynb\n')
    write(copy/'nbs'/'index.ipynb', '# Home', 'See [toy](00_toy.ipynb#what-it-is).')
    write(copy/'nbs'/'00_toy.ipynb', '# Toy', '## What it is', '>>>#| default_exp toy', '>>>#| export\ndef double(x): return 2*x', '$x$')
    return copy

def test_a_whole_site(tree):
    said, found = check_site(tree, workers=0)
    assert found == [] and said.startswith('2 pages')
    write(tree/'nbs'/'index.ipynb', '# Home', 'See [toy](00_toy.ipynb#nothing), [double](toy.html#double).', '$\\frac{$')
    write(tree/'nbs'/'01_new.ipynb', '# New', '>>>#| hide\n1', '![p](p.png)')
    (tree/'README.md').write_text('[x](nbs/nothing.ipynb)')
    found = '\n'.join(check_site(tree, workers=0)[1])
    for said in ('broken anchor: 00_toy.ipynb#nothing', 'TeX math', 'missing image: p.png', '01_new.ipynb is not in sidebar.yml',
                 'README.md: broken link: nbs/nothing.ipynb'): assert said in found, said
    assert 'toy.html#double' not in found

def test_a_cell_that_cannot_run_fails_the_check(tree):
    write(tree/'nbs'/'00_toy.ipynb', '# Toy', '>>>#| default_exp toy', '>>>#| export\nimport no_such_module')
    with pytest.raises(SystemExit, match='could not process'): check_site(tree, workers=2)

@pytest.mark.parametrize('where, said', [(('website', 'page-navigaton'), 'website page-navigaton'), (('website', 'sidebar', 'colapse-level'), 'website sidebar colapse-level'),
                                         (('format', 'html', 'tocdepth'), 'format html tocdepth'), (('web-site',), 'web-site')])
def test_a_key_that_quarto_would_refuse_is_seen(where, said):
    cfg = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert unknown_keys(cfg) == []
    part = cfg
    for key in where[:-1]: part = part[key]
    part[where[-1]] = 1
    assert unknown_keys(cfg) == [f'{said}: no such key']

def test_links_of_the_readme_start_at_the_top():
    text = '[a](00_core.ipynb#x) [b](../LICENSE) [c](https://x.example) [d](#e) ![f](images/g.png)\n\n```md\n[h](i.md)\n```\n'
    assert from_top(text) == ('[a](nbs/00_core.ipynb#x) [b](LICENSE) [c](https://x.example) [d](#e) ![f](nbs/images/g.png)\n\n'
                              '```md\n[h](i.md)\n```\n')
