"""Options and fixtures shared by the tests."""
import gc, os

import pytest
from quick import xla

os.environ.update(xla() | os.environ)     # one test of JAX, in a process of its own, compiles as users do

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow, too')

def pytest_collection_modifyitems(config, items):
    marked = {m: [o for o in items if o.get_closest_marker(m)] for m in ('slow', 'cuda')}
    if not config.getoption('--slow'):
        for o in marked['slow']: o.add_marker(pytest.mark.skip(reason='slow: run with --slow'))
    if marked['cuda']:
        import torch
        if not torch.cuda.is_available():
            for o in marked['cuda']: o.add_marker(pytest.mark.skip(reason='needs a GPU'))

@pytest.fixture(scope='module')
def one_thread():
    "For small problems: waking a second thread costs more than it does."
    import torch
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture
def young_heap():
    "The garbage collector looks at what the test makes, and not at the million objects of the libraries."
    gc.collect(); gc.freeze(); yield; gc.unfreeze()
