"""T1−T2: the hypergradient of one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, final

from hypergrad.backend import Backend, Pullback, Scalar, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.estimators.base import (
    Estimate,
    HypergradientEstimator,
    State,
    assemble,
    inner_reaches,
    inner_state,
    state_after,
)
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches, one_batch
from hypergrad.problems.bilevel import Bilevel
from hypergrad.problems.derivatives import Derivatives
from hypergrad.problems.losses import evaluate
from hypergrad.problems.step import Inner, Seen, Training, inner_gradient, observe
from hypergrad.second_order.differences import FiniteDifference, check_mixed
from hypergrad.updates import as_update_rule


@final
@dataclass(frozen=True)
class Greedy(HypergradientEstimator):
    r"""T1−T2: keep the last term of the sum (Luketina et al. 2016, eq. 3).

        dC2/dλ ≈ ∂_λ C2 + B_tᵀ ∇_θ C2(θ_{t+1}),    B_t = ∂Φ/∂λ at step t

    Trains one step and asks how λ should have been for that step to help T2. Exact for one step of
    training and blind to all steps before; for plain gradient descent B_t = −η ∂²_λθ C̃1, so it is the
    implicit hypergradient with H⁻¹ ≈ η I. Parameters, hyperparameters and the update rule's own rates
    may all be tuned by it.

    Cost: 2 gradients and one product of the training graph, which is the graph of the training gradient
    itself and is not built twice. Where λ enters only through a penalty the product never touches the
    data, and costs O(|θ|). Memory: one training graph.

    With ``mixed=FiniteDifference()`` only first-order gradients of the losses are taken, 4 more of them.

    Args:
        update: the update rule that trains θ.
        response: ``"update"`` differentiates through the optimiser's actual step. ``"gradient"`` is
            eq. 3 to the letter, −(∂²_λθ C̃1)ᵀ ∇_θ C2: no learning rate and no preconditioner, whatever
            the optimiser.
        lookahead: take ∇_θ C2 at θ_{t+1}, as the paper says; ``False`` takes it at θ_t, as its authors'
            code did, so that T1 and T2 could share one pass.
        mixed: how ∂²_λθ C̃1 is multiplied: exactly, or by a `FiniteDifference` where it does not exist.

    Raises:
        DifferenceError: if a finite difference is not accurate enough.
    """

    by_hand: ClassVar[bool] = True

    update: Any
    response: Literal["update", "gradient"] = "update"
    lookahead: bool = True
    mixed: FiniteDifference | None = None

    def __post_init__(self) -> None:
        as_update_rule(self.update)
        if self.response not in ("update", "gradient"):
            raise ArgumentError(f"Greedy: response = {self.response!r}; it is 'update' or 'gradient'")
        check_mixed("Greedy", self.mixed)

    @property
    def training_steps(self) -> int:
        """One."""
        return 1

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params, as_update_rule(self.update).init(backend, params))

    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate:
        z, t, batch = inner_state(state), state.step, one_batch("train", train, state.step)
        phi = Training(backend, problem, as_update_rule(self.update))
        way = _by_hand if problem.by_hand else _exact if self.mixed is None else _by_differences
        step = way(self, phi, z, hparams, batch, t)
        at = step.z if self.lookahead else z
        validation = problem.validation(backend, at.params, hparams, one_batch("val", val, t), at.aux)
        response, responds, report = step.respond(validation.v)
        return assemble(
            backend,
            validation,
            response if self.response == "update" else vectors.scale(backend, -1.0, response),
            responds,
            step.seen,
            state_after(state, step.z, t + 1),
            None if self.allow_unused else inner_reaches(backend, problem, z, hparams, lambda: batch),
            **report,
        )

    def _check(self, backend: Backend, out: Estimate) -> None:
        if self.mixed is not None:
            self.mixed.check(out.report.difference_error)

    def _sound(self, backend: Backend, out: Estimate) -> Any:
        return self.mixed is None or self.mixed.accepts(out.report.difference_error)


class _Step(NamedTuple):
    """A training step, and what pulls ∇_θ C2 back through it: v -> response, which λ respond, the report."""

    z: Inner
    seen: Seen
    respond: Callable[[Tree], tuple[Tree, Tree, dict[str, Any]]]


def _exact(greedy: Greedy, phi: Training, z: Inner, hparams: Tree, batch: Tree, t: Any) -> _Step:
    """The graph of the training gradient is kept, and is half of the mixed term."""
    backend = phi.backend

    def step(hparams: Tree) -> tuple[Tree, tuple[Inner, Seen]]:
        new, seen = phi.step(z, hparams, batch, t)
        return new.params, (new._replace(params=()), seen)

    def gradient(hparams: Tree) -> tuple[Tree, tuple[Tree, Seen]]:
        value, gradient, aux = inner_gradient(backend, phi.problem, z, hparams, batch)
        return gradient, (aux, observe(backend, value, gradient, (), t))

    if greedy.response == "update":
        params, pullback, (rest, seen) = backend.vjp(step, hparams)
        new = rest._replace(params=params)
    else:
        g, pullback, (aux, seen) = backend.vjp(gradient, hparams)
        new = phi.apply(g, z, hparams, t)._replace(aux=aux)

    def respond(v: Tree) -> tuple[Tree, Tree, dict[str, Any]]:
        (response,) = pullback(v)
        return response, pullback.reached[0], {"gradients": 2, "products": 1, "bytes_held": pullback.nbytes}

    return _Step(new, seen, respond)


def _by_differences(greedy: Greedy, phi: Training, z: Inner, hparams: Tree, batch: Tree, t: Any) -> _Step:
    """First-order gradients alone: the optimiser is pulled back through exactly, C̃1 is differenced."""
    backend, problem, mixed = phi.backend, phi.problem, greedy.mixed
    assert mixed is not None
    if not isinstance(problem, Bilevel):
        raise ArgumentError(f"FiniteDifference differences a loss, and {type(problem).__name__} has none")
    loss, draws = problem.loss_on(backend, batch, z.aux), backend.random.state()

    def slopes(params: Tree) -> Tree:
        with backend.random.replay(draws):
            value, pullback, _ = backend.vjp(lambda h: loss(params, h), hparams)
        return pullback(backend.xp.ones_like(value))[0]

    value, pullback, aux = evaluate(backend, "inner", loss, batch, z.params, hparams)
    g, base = pullback(backend.xp.ones_like(value))

    def along(u: Tree) -> tuple[Tree, dict[str, Any]]:
        product, error, gradients = mixed.along(backend, slopes, z.params, u, base)
        return product, {"gradients": 2 + gradients, "products": 0, "difference_error": error}

    seen = _Gradient(value, g, aux)
    return _stepped(greedy, phi, z, hparams, t, seen, along, lambda: pullback.reached[1])


def _by_hand(greedy: Greedy, phi: Training, z: Inner, hparams: Tree, batch: Tree, t: Any) -> _Step:
    """The user's own derivatives of C̃1; the optimiser is pulled back through."""
    backend, problem = phi.backend, phi.problem
    assert isinstance(problem, Derivatives)
    _, mixed = problem.products(backend, z.params, hparams, batch)

    def along(u: Tree) -> tuple[Tree, dict[str, Any]]:
        return mixed(u), {"gradients": 2, "products": 1}

    seen = _Gradient(*inner_gradient(backend, problem, z, hparams, batch))
    return _stepped(greedy, phi, z, hparams, t, seen, along, lambda: backend.map(lambda _: True, hparams))


class _Gradient(NamedTuple):
    """C̃1, its gradient, and the next auxiliary state."""

    value: Scalar
    g: Tree
    aux: Tree


def _stepped(
    greedy: Greedy,
    phi: Training,
    z: Inner,
    hparams: Tree,
    t: Any,
    at: _Gradient,
    along: Callable[[Tree], tuple[Tree, dict[str, Any]]],
    reached: Callable[[], Tree],
) -> _Step:
    """A step whose mixed term comes from elsewhere: ``along`` is u -> (∂²_λθ C̃1)ᵀ u, and what it cost."""
    backend = phi.backend
    update: Pullback | None = None
    if greedy.response == "update":

        def apply(gradient: Tree, hparams: Tree) -> tuple[Tree, Tree]:
            new = phi.apply(gradient, z, hparams, t)
            return new.params, new.opt_state

        params, update, opt_state = backend.vjp(apply, at.g, hparams)
        new = Inner(params, opt_state, at.aux)
    else:
        new = phi.apply(at.g, z, hparams, t)._replace(aux=at.aux)

    def respond(v: Tree) -> tuple[Tree, Tree, dict[str, Any]]:
        u, direct = (v, backend.zeros(hparams)) if update is None else update(v)
        product, report = along(u)
        responds = reached()
        if update is not None:
            responds = backend.map(lambda a, b: a or b, responds, update.reached[1])
        return vectors.add(backend, direct, product), responds, {"bytes_held": 0, **report}

    return _Step(new, observe(backend, at.value, at.g, new.params, t), respond)
