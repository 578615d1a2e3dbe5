"""Hypergradients: the derivative of a validation loss with respect to hyperparameters of training.

    problem   = hg.Bilevel(inner=train_loss, outer=val_loss)
    estimator = hg.Greedy(hg.SGD(0.1))
    state     = estimator.init(problem, params, hparams)
    out       = estimator.estimate(problem, state, hparams, train, val)

Start with `Bilevel`, then `Greedy`, `Unrolled` and `Implicit`; `Tuner` runs the whole loop, and
`check_hypergradient` says whether a number is right on your problem.
"""

from hypergrad.checks.derivatives import DerivativeCheck, check_derivatives
from hypergrad.checks.hypergradient import Check, check_hypergradient
from hypergrad.checks.probe import Probe, probe
from hypergrad.errors import HypergradError
from hypergrad.estimators import (
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
from hypergrad.problems.base import Problem
from hypergrad.problems.bilevel import Bilevel
from hypergrad.problems.derivatives import Derivatives
from hypergrad.problems.fixed_point import FixedPoint
from hypergrad.problems.level import Level
from hypergrad.second_order.differences import FiniteDifference
from hypergrad.second_order.gauss_newton import GaussNewton
from hypergrad.solvers import (
    CG,
    GMRES,
    MINRES,
    Amortised,
    BiCGStab,
    Diagonal,
    Direct,
    External,
    Identity,
    Neumann,
    Nystrom,
    solve,
)
from hypergrad.solvers.levenberg_marquardt import LevenbergMarquardt
from hypergrad.tapes import Binomial, Full, Offload, Reversible, States
from hypergrad.tuning.history import History
from hypergrad.tuning.spaces import Interval, NonNegative, Positive, Real, Simplex
from hypergrad.tuning.tuner import Tuner
from hypergrad.updates import SGD, Adagrad, Adam, AdamW, ClipNorm, Proximal, RMSprop, Schedule, soft_threshold

__all__ = [
    "Problem",
    "Level",
    "FixedPoint",
    "adjoint",
    "check_derivatives",
    "Derivatives",
    "DerivativeCheck",
    "LevenbergMarquardt",
    "CG",
    "GMRES",
    "MINRES",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Amortised",
    "BiCGStab",
    "Bilevel",
    "Binomial",
    "Check",
    "ClipNorm",
    "Diagonal",
    "Direct",
    "Estimate",
    "External",
    "FiniteDifference",
    "Forward",
    "Full",
    "GaussNewton",
    "Greedy",
    "History",
    "HypergradError",
    "HypergradientEstimator",
    "Identity",
    "Implicit",
    "Interval",
    "Neumann",
    "NonNegative",
    "Nystrom",
    "Offload",
    "Positive",
    "Probe",
    "Proximal",
    "RMSprop",
    "Real",
    "Report",
    "Reversible",
    "Schedule",
    "Simplex",
    "State",
    "States",
    "Tuner",
    "Unrolled",
    "check_hypergradient",
    "hypergradient",
    "probe",
    "soft_threshold",
    "solve",
]
