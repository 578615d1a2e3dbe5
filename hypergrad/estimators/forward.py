"""Forward-mode differentiation of training itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import or_
from typing import Any, NamedTuple, final

import numpy as np

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.estimators.assembly import (
    assemble,
    check_start,
    inner_reaches,
    inner_state,
    starting,
    state_after,
)
from hypergrad.estimators.base import Estimate, HypergradientEstimator, State
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches, batch_series, one_batch
from hypergrad.problems.condition import Spent
from hypergrad.problems.step import Inner, Observation, Training
from hypergrad.updates import Updates, as_update_rule


class Tangents(NamedTuple):
    """What `Forward` carries on: the tangents ż_i of the state, and how many estimates there have been."""

    z: Any
    count: Any


@final
@dataclass(frozen=True)
class Forward(HypergradientEstimator):
    r"""Carry ∂z/∂λ forward with training (Franceschi et al. 2017).

        ż_i ← A_t ż_i + B_t e_i,    dC2/dλ = ∂_λ C2 + Σ_i ⟨∇_θ C2, θ̇_i⟩ e_i     e_i: for each number in λ

    The same hypergradient as `Unrolled`, in memory that does not grow with T. The tangents stay in the state:
    an estimate from where the last one ended knows the whole past, also of hyperparameters that moved since
    (real-time hypergradients), so that `Tuner` can look back further than one window.

    With ``directions=b`` the sum is over b random directions d_j of λ's space, orthogonal and each of length
    √n, and

        dC2/dλ ≈ ∂_λ C2 + (1/b) Σ_j ⟨∇_θ C2, θ̇_j⟩ d_j

    is unbiased, as E[d dᵀ] = I. Orthogonal ones repeat nothing of each other: the variance is below that of
    independent directions, and none for b = n. They are drawn anew for every estimate, which then looks back
    T steps: by ``seed`` and by how many estimates the state has seen, so carry the state on, or vary it.

    Cost: 1 + 2n gradients a step, in torch and NumPy two more, where the linearisation is made by transposing
    a pull-back; n or b tangents of z in memory.

    Args:
        update: the update rule that trains θ.
        steps: T, the training steps of one estimate.
        directions: b, or ``None`` for all of λ's.
        seed: of the directions.
        start: as for `Unrolled`.
    """

    update: Updates
    steps: int
    directions: int | None = None
    seed: int = 0
    start: Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        as_update_rule(self.update)
        check_start("Forward", self.start)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ArgumentError(f"Forward: seed = {self.seed!r}; it is an integer from 0 on")
        for name, value in (("steps", self.steps), ("directions", self.directions)):
            if value is None and name == "directions":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"Forward: {name} = {value!r}; it is a positive integer")

    @property
    def training_steps(self) -> int:
        """T."""
        return self.steps

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params, as_update_rule(self.update).init(backend, params))

    def _memory(self, backend: Backend, state: State, hparams: Tree) -> Tangents:
        if self.directions is not None:
            return Tangents(None, 0)
        return Tangents(self._at_rest(backend, inner_state(state), self._axes(backend, hparams, 0)), 0)

    @property
    def needs_every_step(self) -> bool:
        """It does where tangents are carried on."""
        return self.directions is None

    def restarted(self, fresh: State, last: State) -> State:
        """Directions are drawn anew here, too."""
        return fresh if self.directions is None else fresh._replace(memory=last.memory)

    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate[Any]:
        training = Training(backend, problem, as_update_rule(self.update))
        batch = batch_series(backend, "train", train, state.step, self.steps)
        memory = state.memory
        if not isinstance(memory, Tangents) or (self.directions is None and memory.z is None):
            memory = self._memory(backend, state, hparams)  # another estimator's state: nothing is known yet
        axes = self._axes(backend, hparams, memory.count)
        begin, tangents, reached = self._begin(backend, state, hparams, memory, axes)
        reaches = [reached]  # one tree, to which each step adds what it reaches

        def body(
            carry: tuple[Inner, Any, Observation], k: Any, _: Any
        ) -> tuple[tuple[Inner, Any, Observation], None]:
            z, tangents, observed = carry

            def step(params: Tree, opt_state: Tree, hparams: Tree) -> tuple[Any, tuple[Tree, Observation]]:
                before = Inner(params, opt_state, z.aux)
                after, observed = training.step(before, hparams, batch(k), state.step + k)
                return after[:2], (after.aux, observed)

            (params, opt_state), push, (aux, later) = backend.linearize(step, z.params, z.opt_state, hparams)
            reaches[0] = backend.map(or_, reaches[0], push.reached[2])
            moved = backend.each(lambda tangent, axis: push(*tangent, axis), tangents, axes)
            return (Inner(params, opt_state, aux), moved, observed.then(backend, later)), None

        nothing = Observation.none(backend, begin.params)
        (final, tangents, observed), _ = backend.scan(body, (begin, tangents, nothing), self.steps)
        end = state.step + self.steps
        validation = problem.validation(backend, final.params, hparams, one_batch("val", val, end), final.aux)
        count = self._count(backend, hparams)

        def add(total: Tree, i: Any, _: Any) -> tuple[Tree, None]:
            slope = backend.inner(validation.v, backend.take(tangents, i)[0])
            return backend.axpy(slope, backend.take(axes, i), total), None

        response, _ = backend.scan(add, backend.zeros(hparams), count)
        if count < vectors.size(backend, hparams):
            response = vectors.scale(backend, 1.0 / count, response)
        kept = None if self.directions is not None else tangents
        return assemble(
            backend,
            validation,
            response,
            reaches[0],
            observed,
            state_after(state, final, end)._replace(memory=Tangents(kept, memory.count + 1)),
            Spent(
                self.steps + 1,
                self.steps * count,
                count * vectors.nbytes(backend, (final.params, final.opt_state)),
            ),
            None if self.allow_unused else inner_reaches(backend, problem, begin, hparams, lambda: batch(0)),
        )

    def _begin(
        self, backend: Backend, state: State, hparams: Tree, memory: Tangents, axes: Any
    ) -> tuple[Inner, Any, Tree]:
        """z_0, its tangents, and which hyperparameters reach it."""
        z, start, rule = inner_state(state), self.start, as_update_rule(self.update)
        if start is None:
            nowhere = backend.map(lambda _: False, hparams)
            return z, memory.z if self.directions is None else self._at_rest(backend, z, axes), nowhere
        make = starting(backend, start, rule, state)
        begin, push, _ = backend.linearize(lambda hparams: (make(hparams), None), hparams)
        return begin, backend.each(lambda axis: tuple(push(axis)[:2]), axes), push.reached[0]

    @staticmethod
    def _at_rest(backend: Backend, z: Inner, axes: Any) -> Any:
        return backend.each(lambda _: (backend.zeros(z.params), backend.zeros(z.opt_state)), axes)

    def _count(self, backend: Backend, hparams: Tree) -> int:
        n = vectors.size(backend, hparams)
        return n if self.directions is None else min(self.directions, n)

    def _axes(self, backend: Backend, hparams: Tree, count: Any) -> Any:
        """Trees like λ: a basis, or orthogonal directions of length √n."""
        flat, unravel = backend.ravel(hparams)
        n, b = vectors.size(backend, hparams), self._count(backend, hparams)
        if n == 0:
            return backend.empty_rows(hparams, 0)
        if b == n:
            basis = backend.asarray(np.eye(n), like=flat)
            return backend.each(unravel, backend.stack([basis[i] for i in range(n)]))
        about = backend.describe(flat)
        wide = flat if about.itemsize >= 4 else backend.cast(flat, "float32")  # where there are eigenvalues
        drawn = backend.random.normal(self.seed, count, (n, b), wide)
        for _ in range(2):  # the second time for the rounding of the first
            drawn = _orthonormal(backend, drawn)
        rows = backend.cast(n**0.5 * drawn.T, about.dtype)
        return backend.each(unravel, backend.stack([rows[j] for j in range(b)]))


def _orthonormal(backend: Backend, x: Any) -> Any:
    """Polar factor x (xᵀx)^(−1/2): the orthonormal columns next to those of x, and uniform if x is normal."""
    values, axes = backend.xp.linalg.eigh(x.T @ x)
    return x @ (axes * values**-0.5) @ axes.T
