"""What a tape is: a way to run T steps so that they can be pulled back through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.training import Inner, Seen

Step = Callable[[Inner, Tree, Any], tuple[Inner, Seen]]
"""(z_k, λ, k) -> (z_{k+1}, what was seen): the update map with its batch filled in."""


class Recording(NamedTuple):
    """A run of T steps.

    ``pull(v)`` returns Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) v, and for each hyperparameter whether any B_k
    reaches it, as the graph shows.
    """

    z: Inner
    seen: Seen
    pull: Callable[[Inner], tuple[Tree, Tree]]
    bytes_held: Any
    gradients: Scalar
    products: Scalar


class Tape(ABC):
    """How much of a run is kept, and how much is run again.

    Every tape gives the same hypergradient: they differ in memory and time alone.
    """

    @abstractmethod
    def record(self, backend: Backend, step: Step, z: Inner, hparams: Tree, length: int) -> Recording:
        """Run ``length`` ≥ 1 steps from z."""


def run(
    backend: Backend, step: Step, z: Inner, hparams: Tree, length: int, start: int = 0
) -> tuple[Inner, Seen]:
    """Train for ``length`` steps; no graph is kept beyond what an outer derivative asks for."""
    nothing = Seen.nothing(backend, z.params)
    if length == 0:
        return z, nothing

    def body(carry: tuple[Inner, Seen], k: Any, _: Any) -> tuple[tuple[Inner, Seen], None]:
        z, seen = carry
        z, later = step(z, hparams, start + k)
        return (z, seen.then(backend, later)), None

    (z, seen), _ = backend.scan(body, (z, nothing), length)
    return z, seen
