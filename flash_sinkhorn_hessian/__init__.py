__version__ = "0.1.0"

from .core import ConvergenceWarning
from .solve import solve, divergence, Solution, Divergence
from .autograd import ot_cost, ot_hvp, sinkhorn_divergence, sinkhorn_divergence_hvp
from .samples_loss import SamplesLoss
from .torch_sinkhorn_hessian import TorchSinkhornHessian
from .implicit_diff_api import ImplicitDiff

__all__ = ["ConvergenceWarning", "solve", "divergence", "Solution", "Divergence", "ot_cost", "ot_hvp", "sinkhorn_divergence", "sinkhorn_divergence_hvp",
           "SamplesLoss", "TorchSinkhornHessian", "ImplicitDiff"]     # `import *` brings these, and no module of the same name as another package

def __getattr__(name):
    "What needs JAX is imported when it is asked for."
    if name != "SinkhornHessian": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try: import jax
    except ImportError as e: raise ImportError("SinkhornHessian needs JAX: pip install 'flash_sinkhorn_hessian[jax]'; TorchSinkhornHessian has the same methods without it") from e
    from .jax_sinkhorn_hessian import SinkhornHessian
    return SinkhornHessian
