"""C̃1 and C2 of each workload, in the words of any framework."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.workloads import Workload, mlp
from benchmarks.shared.networks import squares

Loss = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Words:
    """What the losses take from a framework; ``xp`` has exp, sum and tanh."""

    xp: Any
    array: Callable[..., Any]
    cross_entropy: Callable[[Any, Any], Any]
    softplus: Callable[[Any], Any]
    dot: Callable[[Any, Any], Any]


def losses(workload: Workload, words: Words, dot: Callable[..., Any] | None = None) -> tuple[Loss, Loss]:
    """``dot`` multiplies with the training matrix in the place of the framework's own."""
    if workload.loss == "mlp":
        return network(words)
    return regression(workload, words, dot or words.dot)


def network(words: Words) -> tuple[Loss, Loss]:
    xp = words.xp

    def outer(params, log_l2, batch):
        return words.cross_entropy(mlp(xp, params, batch[0]), batch[1])

    def inner(params, log_l2, batch):
        return outer(params, log_l2, batch) + squares(xp, params, log_l2)

    return inner, outer


def regression(workload: Workload, words: Words, training_dot: Callable[..., Any]) -> tuple[Loss, Loss]:
    xp = words.xp
    signs = None if workload.penalised is None else words.array(workload.penalised)

    def data(theta, batch, dot):
        z = dot(batch[0], theta)
        if workload.loss == "squares":
            return 0.5 * xp.sum((z - batch[1]) ** 2)
        return xp.sum(words.softplus(-batch[1] * z))

    def inner(theta, log_l2, batch):
        strengths = xp.exp(log_l2) if signs is None else signs * xp.exp(log_l2)
        return data(theta, batch, training_dot) + 0.5 * xp.sum(strengths * theta**2)

    def outer(theta, log_l2, batch):
        return data(theta, batch, words.dot) / len(batch[1])

    return inner, outer
