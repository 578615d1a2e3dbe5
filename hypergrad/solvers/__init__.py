"""Matrix-free solvers of A x = v on trees."""

from hypergrad.solvers.amortised import Amortised
from hypergrad.solvers.base import Preconditioner, Prepared, Solver
from hypergrad.solvers.bicgstab import BiCGStab
from hypergrad.solvers.cg import CG
from hypergrad.solvers.damped import Damped
from hypergrad.solvers.diagonal import Diagonal
from hypergrad.solvers.direct import Direct
from hypergrad.solvers.external import External
from hypergrad.solvers.gmres import GMRES
from hypergrad.solvers.identity import Identity
from hypergrad.solvers.levenberg_marquardt import LevenbergMarquardt
from hypergrad.solvers.minres import MINRES
from hypergrad.solvers.neumann import Neumann
from hypergrad.solvers.nystrom import Nystrom
from hypergrad.solvers.solve import solve
from hypergrad.solvers.system import Image, Solution, System
from hypergrad.solvers.until_accurate import UntilAccurate
from hypergrad.solvers.warm import Warm

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Amortised",
    "BiCGStab",
    "Damped",
    "Diagonal",
    "Direct",
    "External",
    "Identity",
    "Image",
    "LevenbergMarquardt",
    "Neumann",
    "Nystrom",
    "Preconditioner",
    "Prepared",
    "Solution",
    "Solver",
    "System",
    "UntilAccurate",
    "Warm",
    "solve",
]
