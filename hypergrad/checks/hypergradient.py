"""Check whether a hypergradient is right on your own problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Scalar, Tree, find_backend, vectors
from hypergrad.backend.arguments import check_variables
from hypergrad.checks.ridders import jump, ridders
from hypergrad.errors import ArgumentError, InnerNotConvergedError
from hypergrad.estimators import Checks, HypergradientEstimator, Implicit, State, Unrolled
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import (
    Batches,
    BatchList,
    batch_series,
    every_batch,
    is_loader,
    one_batch,
)
from hypergrad.problems.step import Inner, Training
from hypergrad.solvers import Direct, System
from hypergrad.tapes import Trajectory
from hypergrad.updates import as_update_rule

_MOST_NEWTON_STEPS, _MOST_HALVINGS = 100, 40

EVERY_COORDINATE = 64
"""Up to this many hyperparameters are checked one by one, more along random directions."""


@final
@dataclass(frozen=True)
class Check:
    """A hypergradient and two references for it, along a set of directions of the hyperparameters.

    ``estimate``, ``differences`` and ``exact`` hold directional derivatives: of the estimator, of central
    differences of real training, and of that training unrolled exactly. ``uncertainty`` is the error
    of each difference, by its own estimate. ``own`` is the exact derivative of what the estimator itself
    takes for training, if it is another one, and ``None`` if it has no such definition. ``repeated`` is how
    much C2 differs between two runs at the same λ, and ``rounding`` the machine epsilon. ``jump`` is the
    largest difference between the slopes of C2 to both sides of λ: where it is not 0, C2 has a kink there.
    """

    name: str
    training: str
    estimate: Any
    differences: Any
    uncertainty: Any
    exact: Any
    own: Any = None
    repeated: float = 0.0
    rounding: float = 2.0**-52
    jump: float = 0.0

    @property
    def ok(self) -> bool:
        """Does the estimate equal its own definition, as far as the witnesses can tell?

        The definition is the derivative of the estimator's own training steps, or of the optimum. A greedy
        estimate is right by this measure, and may have a `bias` all the same.
        """
        own = self.exact if self.own is None else self.own
        if self.repeated or _relative(self.estimate, own) > self._tolerance:
            return False
        return self.own is not None or self.relative_error <= self._tolerance

    @property
    def bias(self) -> float:
        """The distance of the estimate from real training, relative to it: `relative_error`."""
        return self.relative_error

    @property
    def verdict(self) -> str:
        """What the numbers say, in words."""
        if self.repeated:
            return f"the loss is not deterministic: two evaluations differ by {self.repeated:.1e}"
        if self.jump:
            return (
                f"C2 has a kink at these hyperparameters: slopes to both sides differ by {self.jump:.1e}, "
                "and an estimate is one of its subgradients"
            )
        if not np.any(self.estimate) and not np.any(self.differences):
            return "both are exactly zero: these hyperparameters have no effect here"
        if self.relative_error <= self._tolerance:
            return f"agrees to {max(self.relative_error, self.difference_error):.1e}"
        if self.exact_relative_error <= self._tolerance:
            return (
                "exact for your function, and your function is not your training: something is detached, "
                "or is changed outside of what is passed"
            )
        if not self.ok:
            return f"wrong: {self.bias:.0%} from the differences, and not its own definition either"
        size = float(np.linalg.norm(self.estimate)) / float(np.linalg.norm(self.differences))
        if self.cosine > 0.9 and size < 1:
            found = f"ignores {1 - size:.0%} of the hypergradient; the direction is right"
        else:
            found = f"is {self.bias:.0%} off; the cosine is {self.cosine:.2f}"
        return f"right for its own steps, but against {self.training} it {found}"

    @property
    def _tolerance(self) -> float:
        return float(10 * self.difference_error + self.rounding**0.5)

    @property
    def relative_error(self) -> float:
        """‖estimate − differences‖ / ‖differences‖."""
        return _relative(self.estimate, self.differences)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between estimate and differences; NaN if one of them is zero."""
        return _cosine(self.estimate, self.differences)

    @property
    def exact_relative_error(self) -> float:
        """‖estimate − exact‖ / ‖exact‖."""
        return _relative(self.estimate, self.exact)

    @property
    def exact_cosine(self) -> float:
        """Cosine of the angle between estimate and exact derivative."""
        return _cosine(self.estimate, self.exact)

    @property
    def difference_error(self) -> float:
        """Relative error of the differences themselves: ‖uncertainty‖ / ‖differences‖."""
        return _relative(self.differences + self.uncertainty, self.differences)

    def __str__(self) -> str:
        cosines = ["" if np.isnan(c) else f", cosine {c:.6f}" for c in (self.cosine, self.exact_cosine)]
        directions = f"{len(self.differences)} direction{'s' * (len(self.differences) > 1)}"
        return (
            f"{self.name} against {self.training}, along {directions}\n"
            f"  central differences: relative error {self.relative_error:.1e}{cosines[0]}"
            f"  (the differences' own error: {self.difference_error:.1e})\n"
            f"  exact derivative:    relative error {self.exact_relative_error:.1e}{cosines[1]}\n"
            f"  {self.verdict}"
        )


def check_hypergradient(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    train: Batches,
    val: Batches,
    estimator: HypergradientEstimator,
    *,
    update: Any = None,
    steps: int | None = None,
    directions: int | None = None,
    seed: int = 0,
    aux: Tree = None,
    backend: Backend | str | None = None,
) -> Check:
    r"""Compare a hypergradient with central differences of real training, and with its exact unroll.

    The function differentiated is F(λ) = C2(θ_T(λ), λ), where θ_T is the result of T real training steps from
    ``params``. By default these are the estimator's own steps, so an estimator that is exact for them shows
    rounding errors alone; with more ``steps``, a greedy or truncated estimator shows its *bias*. For
    `Implicit`, training means solving the inner problem by Newton's method from ``params``, unless ``update``
    and ``steps`` are given.

    The differences are Richardson-extrapolated over step sizes that halve (Ridders 1982), which chooses
    the step and estimates the error; how much rounding moves C2 is measured first. Cost: up to 24 training
    runs for each direction, and 6 more.

    Args:
        problem, params, hparams, train, val, estimator: as for `hypergradient`.
        update: the update rule of the real training, if it is not the estimator's.
        steps: T, if it is not the estimator's own; ``train`` must then give that many batches.
        directions: how many random directions; by default every coordinate of up to 64 hyperparameters, and
            32 random directions of more.
        seed: the seed of the random directions.
        aux: the auxiliary state of losses that have one. C2 is always evaluated with the final one of
            training at λ itself, because no estimator takes derivatives with respect to it.
        backend: found from the arrays if it is not given.

    Raises:
        As `HypergradientEstimator.estimate`; ArgumentError if ``update`` is given without ``steps``;
        InnerNotConvergedError if Newton's method does not solve the inner problem.
    """
    backend = find_backend(params, hparams, backend=backend)
    check_variables(backend, params=params, hparams=hparams)
    if is_loader(train):
        train = BatchList(train)  # they are read several times
    val_batch = one_batch("val", val, 0)
    with backend.random.turn(problem):
        random_state = backend.random.state()

        state = estimator.init(problem, params, hparams, aux=aux, backend=backend)
        with backend.random.replay(random_state):
            out = estimator.estimate(problem, state, hparams, train, lambda _: val_batch, backend=backend)

        rule = update if update is not None else getattr(estimator, "update", None)
        if update is not None and steps is None and not estimator.training_steps:
            raise ArgumentError("check_hypergradient: update= needs steps=, the length of the real training")
        if rule is not None and problem.by_hand:
            raise ArgumentError(
                "check_hypergradient compares with an unroll, which hg.Derivatives do not support: "
                "use hg.check_derivatives"
            )
        if rule is not None:
            reference = _training(
                backend, problem, params, aux, train, rule, steps or estimator.training_steps
            )
        else:
            reference = _optimum(backend, problem, params, aux, train)
        with backend.random.replay(random_state):
            final_aux = reference.train(hparams).aux

        def value(hparams: Tree) -> float:
            with backend.random.replay(random_state):
                theta = reference.train(hparams).params
                return float(
                    backend.to_numpy(
                        problem.validation_loss(
                            theta, hparams, val_batch, backend.map(lambda x: x, final_aux)
                        )
                    )
                )

        with backend.random.replay(random_state):
            exact = reference.exact(hparams, lambda _: val_batch)

        axes = _directions(backend, hparams, directions, seed)
        own = None
        if rule is not None and (steps or update) and estimator.is_exact:
            with backend.random.replay(random_state):
                mine = estimator.update, estimator.training_steps  # type: ignore[attr-defined]
                its_own = _training(backend, problem, params, aux, train, *mine)
                own = _along(backend, its_own.exact(hparams, lambda _: val_batch), axes)

        # C2 at λ twice, and a few roundings away from it: its noise.
        rounding = backend.xp.finfo(backend.flatten(hparams)[0][0].dtype).eps
        (first, h0), at = axes[0], value(hparams)
        repeated = abs(value(hparams) - at)
        nearby = [
            at,
            *(value(_shifted(backend, hparams, k * 20 * rounding * h0, first)) for k in range(1, 5)),
        ]
        noise = max(nearby) - min(nearby) + rounding * abs(at)
        lines = [(lambda h, d=d: value(_shifted(backend, hparams, h, d)), h0) for d, h0 in axes]
        slopes = [ridders(line, h0, noise=noise) for line, h0 in lines]
        jumps = [jump(line, h0, at, noise) for line, h0 in lines]
        return Check(
            name=repr(estimator),
            training=reference.name,
            estimate=_along(backend, out.hypergradient, axes),
            differences=np.array([slope for slope, _ in slopes]),
            uncertainty=np.array([error for _, error in slopes]),
            exact=_along(backend, exact, axes),
            own=own,
            repeated=repeated,
            rounding=float(rounding),
            jump=max(map(abs, jumps)),
        )


class _Reference(NamedTuple):
    """Real training, and its exact derivative."""

    name: str
    train: Callable[[Tree], Inner]
    exact: Callable[[Tree, Batches], Tree]


def _training(
    backend: Backend, problem: Problem, params: Tree, aux: Tree, train: Batches, rule: Any, steps: int
) -> _Reference:
    phi = Training(backend, problem, as_update_rule(rule))
    if steps == 1:
        only = one_batch("train", train, 0)
        batch: Callable[[Any], Tree] = lambda k: only  # noqa: E731
    else:
        batch = batch_series(backend, "train", train, 0, steps)

    def real(hparams: Tree) -> Inner:
        z = Inner(params, phi.update.init(backend, params), aux)
        return Trajectory(phi, batch, 0, steps).run(z, hparams)[0]

    def exact(hparams: Tree, val: Batches) -> Tree:
        unrolled = Unrolled(rule, steps, allow_unused=True)
        state = unrolled.init(problem, params, hparams, aux=aux, backend=backend)
        return unrolled.estimate(problem, state, hparams, batch, val, backend=backend).hypergradient

    return _Reference(f"{steps} step{'s' * (steps > 1)} of real training", backend.compile(real), exact)


def _optimum(backend: Backend, problem: Problem, params: Tree, aux: Tree, train: Batches) -> _Reference:
    """Return Newton's method from params, with shorter steps where a whole one would not reduce ‖G‖.

    Near an optimum a few iterations reach it to rounding.
    """
    batches = every_batch("train", train, 0)
    solver = Direct()

    @backend.compile
    def newton(theta: Tree, hparams: Tree) -> tuple[Scalar, Tree]:
        """Return ‖G‖, and the step (∂_θ G)⁻¹ G."""

        def condition(theta: Tree) -> Tree:
            return problem.residual(backend, theta, hparams, batches, aux)[1]

        if problem.symmetric:
            g, pullback = backend.pullback(condition, theta)
            push = pullback.onto(0)
        else:
            g, push, _ = backend.linearize(lambda theta: (condition(theta), None), theta)
        system = System(backend, push, g, problem.symmetric)
        return vectors.norm(backend, g), solver.solve(system).x

    def real(hparams: Tree) -> Inner:
        theta = params
        size, step = newton(theta, hparams)
        small = float(backend.xp.finfo(size.dtype).eps) ** 0.5
        for _ in range(_MOST_NEWTON_STEPS):
            length = float(vectors.norm(backend, step)) / (1 + float(vectors.norm(backend, theta)))
            for halvings in range(1 if length < small else _MOST_HALVINGS):
                trial = backend.axpy(-(0.5**halvings), step, theta)
                after, next_step = newton(trial, hparams)
                if float(after) < float(size):
                    break
            else:
                # No step helps: rounding is reached if the step is short, and else nothing is solved.
                if length < small:
                    return Inner(theta, None, aux)
                break
            theta, size, step = trial, after, next_step
        raise InnerNotConvergedError(float(size), small)

    def exact(hparams: Tree, val: Batches) -> Tree:
        implicit = Implicit(solver, checks=Checks(away="ignore"), allow_unused=True)
        at = State(real(hparams).params, aux=aux)
        return implicit.estimate(problem, at, hparams, batches, val, backend=backend).hypergradient

    return _Reference("the inner problem solved by Newton's method", real, exact)


def _directions(backend: Backend, hparams: Tree, count: int | None, seed: int) -> list[tuple[Any, float]]:
    """Return flat directions with a first step size each: a tenth of the coordinate or the vector's scale."""
    flat = backend.to_numpy(backend.ravel(hparams)[0]).astype(float)
    n = flat.size
    if count is None and n <= EVERY_COORDINATE:
        return [(axis, 0.1 * (abs(x) or 1.0)) for axis, x in zip(np.eye(n), flat, strict=True)]
    drawn = np.random.default_rng(seed).normal(size=(count or 32, n))
    scale = float(np.sqrt(np.mean(flat**2))) or 1.0
    return [(d / np.linalg.norm(d), 0.1 * scale) for d in drawn]


def _shifted(backend: Backend, hparams: Tree, h: float, direction: Any) -> Tree:
    flat, unravel = backend.ravel(hparams)
    tangent = unravel(backend.asarray(direction, like=flat))
    return backend.axpy(h, tangent, hparams)


def _along(backend: Backend, tree: Tree, axes: list[tuple[Any, float]]) -> Any:
    flat = backend.to_numpy(backend.ravel(tree)[0]).astype(float)
    return np.array([d @ flat for d, _ in axes])


def _relative(x: Any, y: Any) -> float:
    size = float(np.linalg.norm(y))
    return float(np.linalg.norm(x - y)) / (size if size > 0 else 1.0)


def _cosine(x: Any, y: Any) -> float:
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 0 else float("nan")
