"""How λ moves, four ways side by side; and Adam for θ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypergrad as hg
from hypergrad.updates import UpdateRule


@dataclass(frozen=True)
class Method:
    """How λ moves.

    ``code`` is what the authors' code did: −(∂²_λθ C̃1)ᵀ ∇_θ C2 at θ_t. ``exact`` differentiates through
    Adam's step and takes ∇_θ C2 at θ_{t+1}. ``clipped`` is the linear domain, clipped at 0; ``positive`` are
    coordinates without a boundary, logarithms for L2 and softplus for noise. T2 is normalised by T1's running
    averages, as in the code, or by its batch's ``own`` statistics.
    """

    response: str
    domain: str
    own: bool = False

    @property
    def name(self) -> str:
        return f"{self.response}-{self.domain}{'-own' if self.own else ''}"

    def estimator(self, update: UpdateRule) -> hg.Greedy:
        if self.response == "code":
            return hg.Greedy(update, response="gradient", lookahead=False)
        return hg.Greedy(update)

    def space(self, names: tuple[str, ...]) -> dict[str, Any]:
        if self.domain == "clipped":
            return {name: hg.NonNegative() for name in names}
        return {name: hg.Positive("exp" if name == "l2" else "softplus") for name in names}

    def update(self, name: str, travel: float) -> UpdateRule:
        """Gradient descent, 0.1 for noise and 1e-4 for L2, is the paper's for the gradient that it has.

        The exact response carries Adam's own step, a thousand times smaller; it takes the paper's other
        choice, Adam for λ, 1e-3 for noise and 1e-6 for L2. Without a boundary one rate of Adam serves all.
        """
        if self.domain == "positive":
            return hg.Adam(5e-3 * travel)
        if self.response == "code":
            return hg.SGD(1e-4 if name == "l2" else 0.1)
        return hg.Adam(travel * (1e-6 if name == "l2" else 1e-3))


METHODS = tuple(
    Method(response, domain) for response in ("code", "exact") for domain in ("clipped", "positive")
)
FIRST = METHODS[0]


@dataclass(frozen=True)
class ByName(UpdateRule):
    """An update rule of its own for each hyperparameter at the top of the tree."""

    rules: tuple[tuple[str, UpdateRule], ...]

    def init(self, backend: Any, params: Any) -> Any:
        return {name: rule.init(backend, params[name]) for name, rule in self.rules}

    def update(
        self, backend: Any, gradient: Any, opt_state: Any, params: Any, hparams: Any, step: Any
    ) -> Any:
        moved = {
            name: rule.update(backend, gradient[name], opt_state[name], params[name], hparams, step)
            for name, rule in self.rules
        }
        return {name: new for name, (new, _) in moved.items()}, {name: s for name, (_, s) in moved.items()}


def annealed_adam(lr: float, total: int) -> UpdateRule:
    """Adam whose rate is flat for two thirds of a run, and then falls linearly to 0."""

    def rate(hparams: Any, t: Any) -> Any:
        line = 3.0 * (1.0 - t / total)
        return lr * 0.5 * (1.0 + line - abs(1.0 - line))  # the smaller of 1 and line, traced or not

    return hg.Adam(hg.Schedule(rate))
