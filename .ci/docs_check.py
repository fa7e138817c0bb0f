"""Check the documentation without Quarto: every internal link, anchor and image, every figure's text, and that every formula parses.

nbdev processes the notebooks, nbconvert writes them as Markdown, and pandoc, whose Markdown Quarto speaks, renders
the pages with MathML. It fails on a warning, so a formula it cannot read is an error. The pages are then searched.
"""
import argparse, os, re, subprocess, sys, tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

import nbformat, pypandoc, yaml
from bs4 import BeautifulSoup

from pages import ROOT, copy_tree, process, to_markdown

LEFT, RIGHT = re.compile(r'\\left(?![a-zA-Z])'), re.compile(r'\\right(?![a-zA-Z])')
LARGEST, ALL = 300 << 10, 10 << 20 # bytes of saved outputs, of a notebook and of the site
Page = namedtuple('Page', 'ids links images refs formulas leftover')
# pages by name, pages by notebook, the folder of the built site, the site's address, the repository's, its folder
Site = namedtuple('Site', 'pages aliases root home source tree')

def pandoc(text, reader='markdown'):
    "Render Markdown; returns the HTML and pandoc's complaints, [] if there are none."
    # Quarto's labels of equations, in words that pandoc knows
    text = re.sub(r'\$\$\s*\{#(eq-[\w-]+)\}', r'$$ []{#\1}', text)
    cmd = [pypandoc.get_pandoc_path(), '-f', reader, '-t', 'html5', '--mathml', '--fail-if-warnings', '--wrap=none']
    done = subprocess.run(cmd, input=text, text=True, encoding='utf-8', capture_output=True)
    if not done.returncode: return done.stdout, []
    again = subprocess.run(cmd[:-2] + cmd[-1:], input=text, text=True, encoding='utf-8', capture_output=True)
    return again.stdout, [re.sub(r'\s+', ' ', o) for o in re.split(r'\n(?=\[)', done.stderr.strip()) if not o.startswith('Failing')]

def parse(html):
    "What a page defines, what it points to, and any formula that was left as text"
    soup = BeautifulSoup(html, 'html.parser')
    ids = {o['id'] for o in soup.find_all(id=True)} | {o['name'] for o in soup.find_all('a', attrs={'name': True})}
    # The hidden links are pandoc's own, one to each line of code.
    links = [o['href'] for o in soup.find_all(href=True) if not o.get('aria-hidden')]
    images = [(o.get('src', ''), o.get('alt') or '') for o in soup.find_all('img')]
    images += [(o['src'], 'not an image') for o in soup.find_all(['script', 'iframe', 'source', 'video'], src=True)]
    refs = [o for s in soup.find_all('span', class_='citation') for o in s.get('data-cites', '').split()]
    formulas = [o.get_text() for o in soup.find_all('annotation', encoding='application/x-tex')]
    for o in soup.find_all(['code', 'pre', 'math', 'script', 'style', 'svg']): o.decompose()
    text = soup.get_text()
    leftover = [f'formula left as text: {o.strip()}' for o in re.findall(r'[^\s]{0,20}(?:\$|\\[a-zA-Z({\[])[^\n]{0,30}', text)]
    # nbdev makes links of symbols in backticks, inside the text of a link too, where Markdown does not allow one.
    leftover += [f'link left as text, no backticks inside a link\'s text: {o.strip()}' for o in re.findall(r'\[[^\s\]]*\]\([^\s)]+', text)]
    return Page(ids, links, images, refs, formulas, leftover)

def resolve(href, page, site):
    "The path inside the site and the anchor that `href` on `page` means, or None if it leads elsewhere"
    if site.home and href.startswith(site.home): href, page = href[len(site.home):].lstrip('/') or 'index.html', ''
    url = urlsplit(href)
    if url.scheme or url.netloc: return None
    path = normpath(join(dirname(page), unquote(url.path))) if url.path else page
    if path in ('.', '') or url.path.endswith('/'): path = normpath(join(path, 'index.html'))
    return path, unquote(url.fragment)

def link_problem(href, page, site):
    "What is wrong with the link `href` on `page`, or None"
    if site.source and href.startswith(site.source):
        path = unquote(urlsplit(href[len(site.source):].lstrip('/')).path)
        return None if (site.tree/path).exists() else f'source link to a file that is not there: {path}'
    target = resolve(href, page, site)
    if target is None: return None
    path, anchor = target
    if path.startswith('..'): return f'broken link: {href} (outside the site; link to the file in the repository by its full address)'
    path = site.aliases.get(path, path)
    if path in site.pages:
        if not anchor or anchor == 'top' or anchor in site.pages[path].ids: return None
        hint = f'; a cell `show_doc(Class.method)` would make it' if '.' in anchor else ''
        return f'broken anchor: {href} (no id "{anchor}" on {path}{hint})'
    return None if (site.root/path).is_file() else f'broken link: {href}'

def image_problem(src, alt, page, site):
    "What is wrong with the image `src` on `page`, or None"
    if not alt: return f'image without a text for those who cannot see it, `#| fig-alt:` or ![text](...): {src[:60]}'
    if src.startswith('data:'): return None
    if urlsplit(src).scheme or urlsplit(src).netloc: return f'fetched from another server: {src}'
    path = normpath(join(dirname(page), unquote(urlsplit(src).path)))
    if not src or path.startswith('..') or not (site.root/path).is_file(): return f'missing image: {src or "(no name)"}'
    return None

def page_problems(name, site):
    "Everything wrong with one page of the site"
    page = site.pages[name]
    found = [link_problem(o, name, site) for o in page.links] + [image_problem(*o, name, site) for o in page.images]
    labels = set().union(*(p.ids for p in site.pages.values()))
    found += [f'broken cross-reference: @{o}' for o in page.refs if o not in labels]
    # Pandoc lets these pass; a browser draws them wrong.
    found += [f'unbalanced \\left and \\right: {o}' for o in page.formulas if len(LEFT.findall(o)) != len(RIGHT.findall(o))]
    found += page.leftover
    return [f'{name}: {o}' for o in dict.fromkeys(found) if o]

def check_pages(texts, root, aliases=None, home='', source='', tree=None, reader='markdown'):
    "Render the Markdown `texts`, keyed by page, whose files lie under `root`; returns the site and what is wrong with it."
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rendered = dict(zip(texts, pool.map(lambda t: pandoc(t, reader), texts.values())))
    site = Site({name: parse(html) for name, (html, _) in rendered.items()}, aliases or {}, Path(root), home, source, tree)
    warned = [f'{name}: {o}' for name, (_, said) in rendered.items() for o in said]
    return site, warned + [o for name in site.pages for o in page_problems(name, site)]

def title_problems(path, name):
    "nbdev keeps only title, subtitle and `- key: value` lines of the title's cell: say so where text would be lost."
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != 'markdown' or not re.search(r'^#\s+\S', cell.source, flags=re.M): continue
        lines = [o for o in cell.source.splitlines() if o.strip() and not re.match(r'#\s+\S|-\s+\S.*:.*\S', o)]
        lost = [o for o in lines if not o.startswith('> ')] + [o for o in lines if o.startswith('> ')][1:]
        return [f'{name}: this line of the title cell would be lost, put it into a cell of its own: {o[:60]}' for o in lost]
    return [f'{name}: no "# Title" cell']

def output_problems(path, name):
    "Saved outputs that would make Quarto load scripts from another server, or that nobody wants to read"
    cells = nbformat.read(path, as_version=4).cells
    size = sum(len(str(o)) for c in cells for o in c.get('outputs', []))
    found = [f'{name}: {size >> 10} KB of saved outputs; {LARGEST >> 10} KB are enough for a notebook'] if size > LARGEST else []
    for i, cell in enumerate(cells):
        kinds = {o for out in cell.get('outputs', []) for o in (out.get('data') or {out.get('name', ''): 0})}
        if bad := kinds & {'text/html', 'application/javascript', 'application/vnd.jupyter.widget-view+json'}:
            found.append(f'{name}, cell {i}: an output of type {min(bad)}, for which Quarto fetches scripts; show Markdown, text or an image')
        if 'stderr' in kinds: found.append(f'{name}, cell {i}: saved what went to stderr')
    return found

# The keys that Quarto's schema knows, of those that a site like this one may want: Quarto refuses any other.
KNOWN = {
    'website': 'title description favicon site-url site-path repo-url repo-subdir repo-branch issue-url repo-actions reader-mode search navbar sidebar body-footer '
               'margin-footer page-navigation back-to-top-navigation bread-crumbs page-footer image image-alt open-graph twitter-card'.split(),
    'website navbar': 'title logo logo-alt logo-href background foreground search pinned collapse collapse-below left right tools'.split(),
    'website sidebar': 'id title logo search tools contents style background foreground border alignment collapse-level pinned header footer'.split(),
    'website page-footer': 'left center right border background foreground'.split(),
    'project': 'type title output-dir lib-dir execute-dir preview render resources pre-render post-render'.split(),
    'format html': 'theme css toc toc-depth toc-location toc-title code-copy code-overflow code-fold code-line-numbers highlight-style html-math-method '
                   'anchor-sections smooth-scroll link-external-newwindow page-layout include-in-header include-after-body embed-resources'.split(),
    '': 'project format website execute metadata-files'.split(),
}

def unknown_keys(cfg):
    "Keys of a configuration that are in no list of `KNOWN`"
    found = []
    for path, known in KNOWN.items():
        part = cfg
        for key in path.split(): part = part.get(key, {}) if isinstance(part, dict) else {}
        if isinstance(part, dict): found += [f'{path} {key}: no such key'.strip() for key in part if key not in known]
    return found

def config_problems(root, names):
    "Files that _quarto.yml and sidebar.yml name, and the settings that keep the site free of other servers"
    cfg = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    html, found = cfg['format']['html'], []
    if html.get('html-math-method') != 'mathml': found.append('html-math-method must be mathml')
    for name in ('_quarto.yml', 'nbs/nbdev.yml', 'nbs/sidebar.yml'):
        if (root/name).is_file(): found += [f'{name}: {o}' for o in unknown_keys(yaml.safe_load((root/name).read_text(encoding='utf-8')))]
    def walk(o):
        if isinstance(o, str): yield o
        elif isinstance(o, dict):
            for v in o.values(): yield from walk(v)
        elif isinstance(o, list):
            for v in o: yield from walk(v)
    themes = [o for o in walk(html.get('theme')) if o.endswith('.scss')]
    found += [f'{o} does not exist' for o in [*walk(html.get('css')), *themes, *cfg.get('metadata-files', [])] if not (root/'nbs'/o).is_file()]
    for o in walk(html.get('css')):
        if not (root/'nbs'/o).is_file(): continue
        for url in re.findall(r'url\(["\']?([^"\')]+)', (root/'nbs'/o).read_text(encoding='utf-8')):
            if not (root/'nbs'/url).is_file(): found.append(f'{o} wants {url}, which is not a file of the site')
    listed = {o for o in walk(yaml.safe_load((root/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))) if o.endswith('.ipynb')}
    found += [f'sidebar.yml names {o}, which is not a notebook' for o in sorted(listed - names)]
    found += [f'{o} is not in sidebar.yml: run `make export`' for o in sorted(names - listed - {'index.ipynb'})]
    if not (root/'nbs'/'_quarto.yml').is_file(): found.append('nbs/_quarto.yml must link to the file at the top')
    return [f'_quarto.yml: {o}' for o in found]

def check_site(root=ROOT, workers=2):
    "Build the pages of the tree at `root` in a temporary copy and check them; returns a summary and the problems."
    from configparser import ConfigParser
    parser = ConfigParser(delimiters=['='])
    parser.read(Path(root)/'settings.ini', encoding='utf-8')
    cfg = parser['DEFAULT']
    home, source = cfg['doc_host'] + cfg['doc_baseurl'], f"{cfg['git_url']}/blob/{cfg['branch']}/"
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_tree(root, tmp)
        notebooks = [p for p in sorted((copy/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(copy).parts)]
        names = {p.relative_to(copy/'nbs').as_posix() for p in notebooks}
        problems = config_problems(copy, names)
        for p in notebooks:
            for check in (title_problems, output_problems): problems += check(p, p.relative_to(copy).as_posix())
        size = sum(p.stat().st_size for p in notebooks)
        if size > ALL: problems.append(f'{size >> 20} MB of notebooks; {ALL >> 20} MB are enough')
        built, texts, aliases = process(copy, workers), {}, {}
        for p in sorted(built.rglob('*.ipynb')):
            front, text, figures = to_markdown(p)
            nb = p.relative_to(built).as_posix()
            page = join(dirname(nb), front.get('output-file', Path(nb).stem + '.html'))
            if page in texts: problems.append(f'{nb}: another notebook is called {page}, too')
            texts[page], aliases[nb] = text, page
            for name, data in figures.items():
                (p.parent/name).parent.mkdir(exist_ok=True)
                (p.parent/name).write_bytes(data)
        if missing := names - aliases.keys(): problems.append(f'not processed: {sorted(missing)}')
        site, found = check_pages(texts, built, aliases, home, source, copy)
        problems += found
        files = {p.name: p.read_text(encoding='utf-8') for p in copy.glob('*.md')}
        top, found = check_pages(files, copy, source=source, tree=copy, reader='gfm')
        problems += found
        # The README points at the site by its address.
        for name, page in top.pages.items():
            said = [link_problem(o, '', site) for o in page.links if o.startswith(home)]
            problems += [f'{name}: {o}' for o in said if o]
    pages = [*site.pages.values(), *top.pages.values()]
    images = sum(len(p.images) for p in pages)
    said = (f'{len(site.pages)} pages and {len(top.pages)} files: {sum(len(p.links) for p in pages)} links, {images} images, '
            f'{sum(len(p.formulas) for p in pages)} formulas')
    return said, problems

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=Path, default=ROOT, help='the tree to check')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    said, problems = check_site(args.root.resolve(), args.workers)
    print(said)
    if problems: sys.exit('\n'.join([*problems, f'{len(problems)} problems in the documentation']))
    print('Every internal link, anchor and image is there, every image has a text, and every formula parses.')
