"""Problems to compare on, one in each file."""

from benchmarks.estimators.comparison.problems.cleaning import Cleaning
from benchmarks.estimators.comparison.problems.denoising import Denoising
from benchmarks.estimators.comparison.problems.depth import Depth
from benchmarks.estimators.comparison.problems.initialisation import Initialisation
from benchmarks.estimators.comparison.problems.multiplicative import MultiplicativeNoise
from benchmarks.estimators.comparison.problems.penalties import Penalties
from benchmarks.estimators.comparison.problems.regularisation import Regularisation
from benchmarks.estimators.comparison.problems.schedule import Schedule

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
