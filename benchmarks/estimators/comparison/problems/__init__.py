"""Problems to compare on, one in each file."""

from comparison.problems.cleaning import Cleaning
from comparison.problems.denoising import Denoising
from comparison.problems.depth import Depth
from comparison.problems.initialisation import Initialisation
from comparison.problems.multiplicative import MultiplicativeNoise
from comparison.problems.penalties import Penalties
from comparison.problems.regularisation import Regularisation
from comparison.problems.schedule import Schedule

PROBLEMS = {
    problem.name: problem
    for problem in (
        Regularisation,
        Cleaning,
        Penalties,
        Schedule,
        Initialisation,
        Depth,
        MultiplicativeNoise,
        Denoising,
    )
}
"""By name, in the order in which they are reported."""
