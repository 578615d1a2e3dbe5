"""Update rules: how a training step turns a gradient into new parameters, for any backend."""

from hypergrad.updates.adagrad import Adagrad
from hypergrad.updates.adam import Adam, AdamW
from hypergrad.updates.base import UpdateRule, Updates, as_update_rule, register_optimiser
from hypergrad.updates.clip import ClipNorm
from hypergrad.updates.formula import Hyper, Schedule
from hypergrad.updates.partition import Partition
from hypergrad.updates.proximal import Proximal, soft_threshold
from hypergrad.updates.rmsprop import RMSprop
from hypergrad.updates.sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "ClipNorm",
    "Hyper",
    "Partition",
    "Proximal",
    "RMSprop",
    "Schedule",
    "UpdateRule",
    "Updates",
    "as_update_rule",
    "register_optimiser",
    "soft_threshold",
]
