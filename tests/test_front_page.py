"""The front page says what was measured: its tables of times against the saved runs, its table of features cell by cell.
And the reference page has every public name."""
import inspect, json, re
from pathlib import Path

import nbformat, pytest, torch

import flash_sinkhorn_hessian
from flash_sinkhorn_hessian import Solution, divergence, solve
from flash_sinkhorn_hessian.core import random_problem

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
CELLS = nbformat.read(NBS/'index.ipynb', as_version=4).cells
OURS, FLASH, OTT, GEOMLOSS, POT = 'this package', 'flash-sinkhorn', 'OTT-JAX', 'GeomLoss', 'POT'
POINTS, LINEAR, BLOCKS, STACK, DOUBLE, STOP, NULL = (
    'Hessian in the points', 'Hessian-vector product in linear memory', 'the same for divergence, weights, cross blocks',
    'several directions at once, in linear memory', 'sums streamed in float64', 'the solve stops on', "null direction of the Hessian's system")

def test_times_agree_with_the_saved_runs(monkeypatch):
    "The hidden cells that write the tables, run again, write what is saved."
    monkeypatch.chdir(NBS)
    code = [c for c in CELLS if c.cell_type == 'code' and '#| echo: false' in c.source]
    space = {}
    for c in code: exec(c.source, space)
    saved, = (o.data['text/markdown'] for c in code for o in c.outputs if 'text/markdown' in o.get('data', {}))
    assert space['table'](space['H']) + '\n\n' + space['table'](space['C']) == saved, 'run nbs/index.ipynb again, then `make readme`'
    assert saved in (ROOT/'README.md').read_text(encoding='utf-8')

def features():
    "The table of features as a dictionary (row, column) -> cell"
    text, = (c.source for c in CELLS if f'| {POINTS} |' in c.source)
    lines = [[o.strip() for o in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]
    return {(row[0], name): cell for row in lines[2:] for name, cell in zip(lines[0][1:], row[1:]) if cell}

def problem(): return random_problem(7, 9, 2)

def cost(backend='dense', **kw): return solve(**{**problem(), **kw}, eps=.1, tol=1e-12, backend=backend)

def closed_form():
    "The Hessian against central differences of the gradient"
    q, h = problem(), 1e-5
    v = torch.randn_like(q['x'])
    lo, hi = (cost(x=q['x'] + s*h*v).grad('x') for s in (-1, 1))
    return torch.allclose(torch.einsum('ikjl,jl->ik', cost().hessian('x'), v), (hi - lo)/(2*h), atol=1e-7)

def every_block():
    "Streamed products of the divergence, in weights and across, against the dense blocks"
    q, close = problem(), lambda a, b: torch.allclose(a, b, atol=1e-8)
    flat = lambda s, wrt, v: (s.hessian(wrt).reshape(-1, v.numel()) @ v.flatten())
    pairs = [(wrt, torch.randn_like(q[wrt[1]])) for wrt in (('x', 'x'), ('a', 'a'), ('x', 'y'), ('x', 'b'), ('y', 'a'))]
    pairs = [(w, v - v.mean() if w[1] in 'ab' else v) for w, v in pairs]
    dense, streamed = ([make(**q, eps=.1, tol=1e-12, backend=b) for make in (solve, divergence)] for b in ('dense', 'streaming'))
    return all(close(s.hvp(v, w).flatten(), flat(d, w, v)) for d, s in zip(dense, streamed) for w, v in pairs)

def stack():
    s, v = cost('streaming'), torch.randn(3, 7, 2, dtype=torch.float64)
    return torch.allclose(s.hvp(v), torch.stack([s.hvp(o) for o in v]), atol=1e-9)

def in_float64(): return cost('streaming').value.dtype == torch.float64 and abs(cost('streaming').value - cost().value) < 1e-12

def stops_on_marginals():
    s = solve(**problem(), eps=.01, tol=1e-7)
    return abs(s.plan().sum(1) - problem()['a']).sum() <= 1e-7 and s.marginal_error <= 1e-7

def no_ridge():
    "A common translation is answered by 2a to rounding; a ridge would show."
    s = cost()
    return torch.allclose(s.hvp(torch.ones(7, 2, dtype=torch.float64), solver='cg'), 2*problem()['a'][:, None].expand(7, 2), atol=1e-12)

def geomloss_blocks():
    "GeomLoss's double backward, converged: the blocks off the diagonal are zero, and ours are not."
    from geomloss import SamplesLoss
    q = problem()
    f = lambda x: SamplesLoss('sinkhorn', p=2, blur=.1**.5, debias=False, scaling=.99)(q['a'], x, q['b'], q['y'])
    off = lambda H: max(H[i, :, j].abs().max().item() for i in range(7) for j in range(7) if i != j)
    return off(torch.autograd.functional.hessian(f, q['x'])) < 1e-12 and off(cost().hessian('x')) > 1e-3

def row(file, task, peer, **want):
    "The saved row of a measurement"
    rows = json.loads((NBS/'results'/f'{file}.json').read_text(encoding='utf-8'))['rows']
    return next(r for r in rows if r['task'] == task and r['peer'].startswith(peer) and all(r.get(k) == v for k, v in want.items()))

def right(peer): return lambda: row('cpu_hessian', 'hessian', peer, n=30)['error'] < 1e-4

def quadratic(peer):
    "Peak memory holds at least one array of pairs"
    return lambda: all(row('cpu_scaling', 'half-step', peer, n=n, d=3)['peak_mib'] > n*n*4/2**20 for n in (1000, 3000))

def pot_stops():
    "What POT's loop compares with its threshold is the error of a marginal."
    ot = pytest.importorskip('ot')
    q = {k: v.numpy() for k, v in problem().items()}
    P, log = ot.sinkhorn(q['a'], q['b'], ot.dist(q['x'], q['y']), .1, stopThr=1e-6, log=True)
    return log['err'][-1] < 1e-6 and abs(P.sum(0) - q['b']).max() < 1e-5

def said(path, text): return lambda: re.sub(r'\s+', ' ', text) in re.sub(r'\s+', ' ', (ROOT/path).read_text(encoding='utf-8').replace('\\n",', '').replace('"', ''))

PEERS = 'nbs/28_bench_peers.ipynb'
DENSE = {OTT: said(PEERS, 'Everything is dense'), POT: said(PEERS, 'the arrays of libraries that take a cost'), GEOMLOSS: said(PEERS, 'Only its dense')}
# A computation, a saved measurement, the place in the repository that says what was read or run, or what was seen, in words
EVIDENCE = {
    (POINTS, OURS): closed_form, (POINTS, FLASH): said('nbs/20_migration.ipynb', 'hvp_x_sqeuclid_from_potentials'), (POINTS, OTT): right('ott'),
    (POINTS, GEOMLOSS): geomloss_blocks, (POINTS, POT): right('pot'),
    (LINEAR, OURS): said('tests/test_memory.py', 'h = s.hvp('), (LINEAR, FLASH): lambda: row('gpu_hvp', 'hvp', 'flash', n=10_000, eps=.005)['peak_mib'] < 10,
    **{(LINEAR, p): quadratic(p.split('-')[0].lower()) for p in (OTT, GEOMLOSS, POT)},
    (BLOCKS, OURS): every_block, (BLOCKS, FLASH): said(PEERS, 'Its Hessian-vector product is given converged potentials'), **{(BLOCKS, p): DENSE[p] for p in DENSE},
    (STACK, OURS): stack, (STACK, FLASH): said(PEERS, 'Several directions are a loop'), **{(STACK, p): DENSE[p] for p in DENSE},
    (DOUBLE, OURS): in_float64, (DOUBLE, FLASH): 'run: clouds in float64 come back from flash-sinkhorn 0.4.1 as float32, without a word', (DOUBLE, OTT): DENSE[OTT], (DOUBLE, GEOMLOSS): said(PEERS, 'the other needs KeOps'), (DOUBLE, POT): DENSE[POT],
    (STOP, OURS): stops_on_marginals, (STOP, FLASH): said(PEERS, 'has no stopping rule on the marginals'), (STOP, OTT): said(PEERS, 'which is the L1 marginal error'),
    (STOP, GEOMLOSS): said(PEERS, 'It chooses its iterations from a schedule'), (STOP, POT): pot_stops,
    (NULL, OURS): no_ridge, (NULL, FLASH): said(PEERS, 'ridge $10^{-5}$'),
}

def test_every_word_has_evidence(): assert features().keys() == EVIDENCE.keys()

@pytest.mark.parametrize('row, column', EVIDENCE, ids=lambda o: o[:24])
def test_feature(row, column):
    evidence = EVIDENCE[row, column]
    assert isinstance(evidence, str) or evidence(), f'{row}, {column}: {features()[row, column]}'

def test_the_reference_has_every_public_name():
    cells = nbformat.read(NBS/'reference.ipynb', as_version=4).cells
    shown = {m for c in cells for m in re.findall(r'^show_doc\(([\w.]+)\)', c.source, flags=re.M)}
    public = {n for n, o in vars(flash_sinkhorn_hessian).items() if n[0] != '_' and getattr(o, '__module__', '').startswith('flash_sinkhorn_hessian')}
    methods = {f'Solution.{n}' for n, o in vars(Solution).items() if n[0] != '_' and callable(o)}
    assert public - {'Solution', 'Divergence'} | methods <= shown, public | methods - shown

SHAPE, RAISES = re.compile(r'\((B, )?[nmk](\*d)?(, [nmdk*]+)*,?\)|scalar'), re.compile(r'\bErrors\b|\bRaises\b|(Type|Value)Error')
SILENT = {'Solution.plan', 'Solution', 'Divergence', 'ConvergenceWarning'}     # they take nothing that could be wrong
OURS_TOLD = {*(f'Solution.{n}' for n in ('value', 'apply', 'apply_t', 'grad', 'hvp', 'hessian', 'hessian_operator')), 'Divergence.grad',
             'solve', 'divergence', 'ot_cost', 'sinkhorn_divergence', 'ot_hvp', 'sinkhorn_divergence_hvp'}

def shown():
    "Every name of the reference page with its object and the prose of its section"
    space, section = {}, ''
    for c in nbformat.read(NBS/'reference.ipynb', as_version=4).cells:
        if c.cell_type == 'markdown': section = c.source if c.source.startswith('#') else section + c.source
        elif re.search(r'^(from|import) ', c.source, flags=re.M): exec(c.source, space)
        for name in re.findall(r'^show_doc\(([\w.]+)\)', c.source, flags=re.M): yield name, eval(name, space), section

def told(obj):
    "What `help` says of an object, and the comments beside its parameters; a class speaks through its constructor, too."
    made = obj.__init__ if inspect.isclass(obj) and '__init__' in vars(obj) else obj
    try: head = inspect.getsource(inspect.unwrap(made)).split('\n    "', 1)[0]
    except (OSError, TypeError): head = ''
    return (inspect.getdoc(obj) or ''), ' '.join(re.findall(r'#(.*)', head))

@pytest.mark.parametrize('name', sorted({*OURS_TOLD, 'Solution', 'Solution.f', 'Solution.g', 'Solution.plan', 'Divergence'}))
def test_help_tells_shapes_errors_and_source(name):
    "At a prompt, without the site"
    doc, comments = told(eval(name, vars(flash_sinkhorn_hessian)))
    assert SHAPE.search(doc), f'{name}: no shapes'
    if name in OURS_TOLD: assert 'Errors:' in doc and ('Source:' in doc or name in ('Solution.apply', 'Solution.apply_t', 'Solution.hessian_operator')), name

def test_every_public_name_tells_shapes_and_errors():
    for name, obj, section in shown():
        doc, comments = told(obj)
        assert len(doc) > 20, name
        assert name in SILENT or RAISES.search(doc) or '**Errors.**' in section, f'{name}: neither its docstring nor its section says what it raises'
        assert name == 'ConvergenceWarning' or SHAPE.search(doc + comments + section), f'{name}: no shapes'
