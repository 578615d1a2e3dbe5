"""One run to differentiate, and what it took; the targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypergrad as hg

HYPERPARAMETERS, SLOTS = 4, 20
RATE, MOMENTUM = 0.01, 0.9
RULE = hg.SGD(RATE, momentum=MOMENTUM)
NAN, MB = float("nan"), 1e6

# Targets of PERFORMANCE.md: FLOPs of a step in g, and copies of θ. The state z is θ and its velocity.
COST = {"Full": 3.0, "States": 4.05, "Reversible": 4.3, "Forward": 1 + 2 * HYPERPARAMETERS}
SLOPE = {"States": 1.05 * 2}
AT_1000 = {"Binomial": 5.6, "Reversible": 14.0}
FLAT, ABOVE = 1.02, 200 * MB


@dataclass(frozen=True)
class Case:
    """One run to differentiate. The clock takes ``seconds``, or one run if that is longer, or none for 0."""

    backend: str
    tape: str
    length: int
    width: int
    batch: int
    directory: str
    limit: float
    seconds: float
    counted: bool = True
    max_bytes: int | None = None
    donate: bool = False

    @property
    def estimator(self) -> Any:
        if self.tape == "Forward":
            return hg.Forward(RULE, self.length)
        return hg.Unrolled(RULE, self.length, tape=TAPES[self.tape](self))

    @property
    def cost(self) -> float | None:
        """What is asked of a step, in FLOPs."""
        if self.tape == "Binomial":
            return AT_1000["Binomial"] if self.length == 1000 else None
        return 3.8 if (self.tape, self.backend) == ("States", "jax") else COST.get(self.tape)


def binomial(case: Case) -> Any:
    return hg.Binomial(max_bytes=case.max_bytes) if case.max_bytes else hg.Binomial(slots=SLOTS)


TAPES: dict[str, Callable[[Case], Any]] = {
    "Full": lambda case: hg.Full(),
    "States": lambda case: hg.States(),
    "Offload": lambda case: hg.Offload(hg.States(), case.directory),
    "Binomial": binomial,
    "Reversible": lambda case: hg.Reversible(),
}
LABELS = {
    "Offload": "Offload(States) to a file",
    "Binomial": f"Binomial({SLOTS})",
    "Forward": f"Forward, {HYPERPARAMETERS} hyperparameters",
}


@dataclass(frozen=True)
class Measurement:
    """What a run took: memory in bytes, cost in training gradients per step, and the estimate in seconds."""

    case: Case
    copy: int
    in_all: float
    over_a_step: float
    flops: float = NAN
    time: float = NAN
    seconds: float = NAN

    @property
    def copies(self) -> float:
        return self.in_all / self.copy
