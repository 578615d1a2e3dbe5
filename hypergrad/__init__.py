"""Hypergradients: the derivative of a validation loss with respect to hyperparameters of training.

    problem   = hg.Bilevel(inner=train_loss, outer=val_loss)
    estimator = hg.Greedy(hg.SGD(0.1))
    state     = estimator.init(problem, params, hparams)
    out       = estimator.estimate(problem, state, hparams, train, val)

Start with `Bilevel`, then `Greedy`, `Unrolled` and `Implicit`; `Tuner` runs the whole loop, and
`check_hypergradient` says whether a number is right on your problem.
"""

from hypergrad.check import Check, check_hypergradient
from hypergrad.curvature import GaussNewton
from hypergrad.damping import LevenbergMarquardt
from hypergrad.derivatives import DerivativeCheck, Derivatives, check_derivatives
from hypergrad.differences import FiniteDifference
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
from hypergrad.fixed_point import FixedPoint
from hypergrad.history import History
from hypergrad.probe import Probe, probe
from hypergrad.problem import Bilevel, Level, Problem
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
from hypergrad.spaces import Interval, NonNegative, Positive, Real, Simplex
from hypergrad.tapes import Binomial, Full, Offload, Reversible, States
from hypergrad.tuner import Tuner
from hypergrad.updates import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    ClipNorm,
    Proximal,
    RMSprop,
    Schedule,
    soft_threshold,
)

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
