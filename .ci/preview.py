"""Render the pages into _preview without Quarto, with the same markup where it matters, to look at them in a browser.

nbdev processes the notebooks; pandoc, whose Markdown Quarto speaks, renders them with MathML; the two themes are compiled
from Bootstrap's and Bootswatch's own sources, with nbs/styles.css on top. Each page comes twice, page.html and page.dark.html.
It needs npm: `make preview` installs what it wants into _preview/node, then measures every page with look.js.
"""
import argparse, html, re, shutil, subprocess, tempfile
from base64 import b64decode
from pathlib import Path

import pypandoc, yaml

from pages import ROOT, copy_tree, process, read

THEMES = {'light': ('cosmo', 'pygments'), 'dark': ('darkly', 'zenburn')}
# The columns of a page: sidebar, text, contents. On a phone the text alone.
LAYOUT = '''
body { margin: 0; padding-top: 56px } .navbar { position: fixed; top: 0; left: 0; right: 0; z-index: 10; height: 56px }
#content { display: grid; grid-template-columns: minmax(0, 1fr); padding: 0 1rem } main { min-width: 0; max-width: 800px; width: 100%; margin: 1em auto } #content > nav { display: none }
@media (min-width: 992px) { #content { grid-template-columns: 250px minmax(0, 800px) 250px; gap: 2rem; justify-content: center }
  #content > nav { display: block; position: sticky; top: 56px; height: calc(100vh - 56px); overflow: auto; font-size: .875rem; padding-top: 1.2em } #content > nav b { display: block; margin: .8em 0 .2em } #content > nav a { display: block; color: inherit; text-decoration: none } }
h2 { margin-top: 2rem; border-bottom: 1px solid var(--bs-border-color); padding-bottom: .5rem } figure { margin: 0 } pre { margin: 0 }
div.sourceCode { background: rgba(128, 136, 144, .12); margin: 1em 0; overflow: auto } pre.sourceCode { padding: .4em; font-size: .875em } pre > code.sourceCode { white-space: pre-wrap }
:is(p, li, td) > code { background: rgba(128, 136, 144, .12); padding: .125rem .25rem; font-size: .875em } .cell-output-display { overflow-x: auto }
'''

def pandoc(text, *args):
    "Markdown to HTML"
    cmd = [pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html5', '--mathml', '--standalone', '--metadata', 'title=x', *args]
    return subprocess.run(cmd, input=text, text=True, encoding='utf-8', capture_output=True, check=True).stdout

def colours(style):
    "pandoc's style sheet for code, without a ground of its own"
    css = pandoc('```python\nx = 1\n```\n', f'--highlight-style={style}')
    return re.sub(r'div\.sourceCode\s*\{[^}]*color[^}]*\}', '', re.search(r'(pre > code\.sourceCode.*?)</style>', css, re.S)[1])

def theme(name, modules, out):
    "Compile one theme, without fonts from other servers."
    scss = out/f'{name}.scss'
    parts = [f'bootswatch/dist/{name}/variables', 'bootstrap/scss/bootstrap', f'bootswatch/dist/{name}/bootswatch']
    scss.write_text((ROOT/'nbs'/'no-remote-fonts.scss').read_text(encoding='utf-8') + ''.join(f'@import "{o}";\n' for o in parts))
    subprocess.run([modules/'.bin'/'sass', '--quiet', '--no-source-map', '-I', modules, scss, out/f'{name}.css'], check=True)

def cell_text(i, cell, alts, figures, stem):
    "A cell as the Markdown that Quarto makes of it; its images go into `figures`."
    if cell.cell_type != 'code': return cell.source
    out, fence = [f'::: {{#cell-{i} .cell}}'], '`'*7
    if not cell.metadata.get('transient', {}).get('remove_source'): out.append(f'{fence} {{.python .cell-code}}\n{cell.source}\n{fence}')
    for k, o in enumerate(cell.outputs):
        data, kind = o.get('data', {}), 'display' if 'data' in o else o.get('name', 'error')
        if 'text/markdown' in data: text = data['text/markdown']
        elif 'image/png' in data:
            name = f'figures/{stem}_{i}_{k}.png'
            figures[name] = b64decode(data['image/png'])
            text = f'![]({name}){{alt="{html.escape(alts.get(i, ("",))[0])}"}}'
        else: text = f'{fence}\n{data.get("text/plain", o.get("text", ""))}\n{fence}'
        out.append(f'::: {{.cell-output .cell-output-{kind}}}\n{text}\n:::')
    return '\n\n'.join([*out, ':::'])

def page(path, built, out, menu, css):
    "Write one page in both themes."
    front, nb, alts = read(path)
    rel, figures = path.parent.relative_to(built), {}
    stem, up = Path(front.get('output-file', path.stem)).stem, '../'*len(rel.parts)
    text = '\n\n'.join(cell_text(i, c, alts, figures, stem) for i, c in enumerate(nb.cells))
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp)/'t.html').write_text('$toc$<!--SPLIT-->$body$')
        toc, _, body = pandoc(text, '--toc', f'--template={tmp}/t.html').partition('<!--SPLIT-->')
    (out/rel/'figures').mkdir(parents=True, exist_ok=True)
    for name, data in figures.items(): (out/rel/name).write_bytes(data)
    words = re.sub('`([^`]+)`', r'<code>\1</code>', front.get('description') or '')
    title, links = front.get('title', stem), ''.join(f'<a href="{up}{o}">{html.escape(t)}</a>' if o else f'<b>{html.escape(t)}</b>' for t, o in menu)
    for mode, (name, _) in THEMES.items():
        (out/rel/f'{stem}{"" if mode == "light" else ".dark"}.html').write_text(f'''<!DOCTYPE html>
<html data-bs-theme="{mode}" lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<link rel="stylesheet" href="{up}{name}.css"><style>{css[mode]}{LAYOUT}</style><link rel="stylesheet" href="{up}styles.css"></head>
<body class="quarto-{mode}"><div class="navbar bg-primary" data-bs-theme="dark"><div class="container-fluid"><a class="navbar-brand" href="{up}index.html">{title}</a></div></div>
<div id="content"><nav>{links}</nav><main><h1>{title}</h1><div class="description">{words}</div>
{body.replace('<table', '<table class="table"')}</main><nav>{toc}</nav></div></body></html>''', encoding='utf-8')

def main(root, modules, out):
    "Render every page of the tree at `root` into `out`."
    out.mkdir(exist_ok=True)
    css = {mode: colours(style) for mode, (_, style) in THEMES.items()}
    for name, _ in THEMES.values(): theme(name, modules, out)
    with tempfile.TemporaryDirectory() as tmp:
        built = process(copy_tree(root, tmp))
        paths = sorted(built.rglob('*.ipynb'))
        heads = {p.relative_to(built).as_posix(): read(p)[0] for p in paths}
        known = {o: (f.get('title', o), (Path(o).parent/f.get('output-file', Path(o).stem + '.html')).as_posix()) for o, f in heads.items()}
        menu = []
        for o in yaml.safe_load((built/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
            menu += [known[o]] if isinstance(o, str) else [(o['section'], None), *(known[c] for c in o['contents'])]
        for p in paths: page(p, built, out, menu, css)
        for name in ('images', 'fonts', 'styles.css'):
            (shutil.copytree if (built/name).is_dir() else shutil.copyfile)(built/name, out/name, **({'dirs_exist_ok': True} if (built/name).is_dir() else {}))
    print(f'{len(paths)} pages in {out}')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--modules', type=Path, default=ROOT/'_preview'/'node'/'node_modules')
    parser.add_argument('--out', type=Path, default=ROOT/'_preview')
    args = parser.parse_args()
    main(ROOT, args.modules.resolve(), args.out)
