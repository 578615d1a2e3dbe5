"""Hypergradients: the derivative of a validation loss with respect to hyperparameters of training.

    problem   = hg.Bilevel(inner=train_loss, outer=val_loss)
    estimator = hg.Greedy(hg.SGD(0.1))
    state     = estimator.init(problem, params, hparams)
    out       = estimator.estimate(problem, state, hparams, train, val)

Start with `Bilevel`, then `Greedy`, `Unrolled` and `Implicit`; `Tuner` runs the whole loop, and
`check_hypergradient` tells whether a hypergradient is right on your problem.

    Problems      Bilevel, FixedPoint, Derivatives, Level
    Estimators    Greedy, Unrolled, Forward, Implicit; they return an Estimate with a State and a Report
    Update rules  SGD, Adam, AdamW, RMSprop, Adagrad; around rules: ClipNorm, Partition, Proximal;
                  Schedule for rates
    Tapes         Full, States, Binomial, Reversible, Offload: how `Unrolled` stores a run
    Solvers       CG, MINRES, GMRES, BiCGStab, Neumann, Nystrom, Diagonal, Direct, Identity, External,
                  Amortised; around a solver: Warm, UntilAccurate, Damped, LevenbergMarquardt
    Products      Exact, FiniteDifference, GaussNewton: how second derivatives are multiplied
    Tuning        Tuner, History; spaces of hyperparameters: Real, Positive, NonNegative, Interval, Simplex
    Checks        check_hypergradient, check_derivatives, error_bound, probe
"""

from hypergrad.checks import (
    Check,
    DerivativeCheck,
    Probe,
    check_derivatives,
    check_hypergradient,
    error_bound,
    probe,
)
from hypergrad.errors import HypergradError
from hypergrad.estimators import (
    Checks,
    Estimate,
    Forward,
    Greedy,
    HypergradientEstimator,
    Implicit,
    Report,
    State,
    Unrolled,
    adjoint,
    hypergradient,
)
from hypergrad.problems import Bilevel, Derivatives, FixedPoint, Level, Problem
from hypergrad.second_order import Exact, FiniteDifference, GaussNewton, Products
from hypergrad.solvers import (
    CG,
    GMRES,
    MINRES,
    Amortised,
    BiCGStab,
    Damped,
    Diagonal,
    Direct,
    External,
    Identity,
    LevenbergMarquardt,
    Neumann,
    Nystrom,
    Solver,
    UntilAccurate,
    Warm,
    solve,
)
from hypergrad.tapes import Binomial, Full, Offload, Reversible, States, Tape
from hypergrad.tuning import History, Interval, NonNegative, Positive, Real, Simplex, Space, Tuner
from hypergrad.updates import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    ClipNorm,
    Partition,
    Proximal,
    RMSprop,
    Schedule,
    UpdateRule,
    soft_threshold,
)
from hypergrad.version import __version__

__all__ = [
    "__version__",
    # Problems
    "Problem", "Bilevel", "FixedPoint", "Derivatives", "Level",
    # Estimators
    "HypergradientEstimator", "Greedy", "Unrolled", "Forward", "Implicit", "Checks",
    "hypergradient", "adjoint", "State", "Estimate", "Report",
    # Update rules
    "UpdateRule", "SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "ClipNorm", "Partition",
    "Proximal",
    "soft_threshold", "Schedule",
    # Tapes
    "Tape", "Full", "States", "Binomial", "Reversible", "Offload",
    # Solvers
    "Solver", "CG", "MINRES", "GMRES", "BiCGStab", "Neumann", "Nystrom", "Diagonal", "Direct", "Identity",
    "External", "Amortised", "Warm", "UntilAccurate", "Damped", "LevenbergMarquardt", "solve",
    # Products
    "Products", "Exact", "FiniteDifference", "GaussNewton",
    # Tuning
    "Tuner", "History", "Space", "Real", "Positive", "NonNegative", "Interval", "Simplex",
    # Checks
    "check_hypergradient", "Check", "check_derivatives", "DerivativeCheck", "error_bound", "probe", "Probe",
    # Errors
    "HypergradError",
]  # fmt: skip
