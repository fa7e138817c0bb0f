__version__ = "0.1.0"

from .core import ConvergenceWarning
from .solve import solve, divergence, Solution, Divergence
