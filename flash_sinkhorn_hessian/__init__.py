__version__ = "0.1.0"

from .core import ConvergenceWarning
from .solve import solve, divergence, Solution, Divergence
from .autograd import ot_cost, sinkhorn_divergence
from .samples_loss import SamplesLoss
