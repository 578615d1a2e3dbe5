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
    inner_state,
    start_map,
    state_after,
    used_by_inner,
)
from hypergrad.estimators.base import Estimate, HypergradientEstimator, State
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches, batch_series, one_batch
from hypergrad.problems.condition import Spent
from hypergrad.problems.step import Inner, Observation, Training
from hypergrad.solvers.base import check_seed
from hypergrad.updates import Updates, as_update_rule


class Tangents(NamedTuple):
    """The memory of `Forward`: the tangents ż_i of the state, and the number of estimates so far."""

    z: Any
    count: Any


@final
@dataclass(frozen=True)
class Forward(HypergradientEstimator):
    r"""Propagate ∂z/∂λ forward during training (Franceschi et al. 2017).

        ż_i ← A_t ż_i + B_t e_i,    dC2/dλ = ∂_λ C2 + Σ_i ⟨∇_θ C2, θ̇_i⟩ e_i

    where e_i is the unit vector of the i-th of n numbers in λ.

    Gives the same hypergradient as `Unrolled`, in memory that does not grow with T. The tangents are kept in
    the state, so an estimate that continues from the last one includes all earlier steps, even if λ has been
    updated since (real-time hypergradients). `Tuner` can thus look back further than one window.

    With ``directions=b`` the sum is over b random directions d_j of λ's space, orthogonal and each of length
    √n, and

        dC2/dλ ≈ ∂_λ C2 + (1/b) Σ_j ⟨∇_θ C2, θ̇_j⟩ d_j

    is unbiased, as E[d dᵀ] = I. Orthogonal directions do not overlap, so the variance is below that of
    independent ones, and zero for b = n. They are drawn anew for every estimate, which therefore looks back
    only T steps. The draw depends on ``seed`` and on the number of estimates so far, which the state counts:
    pass the state on from estimate to estimate, or vary ``seed``.

    Cost: 1 + 2n gradients a step, and two more in torch and NumPy, which linearise by transposing a
    pull-back. Memory: n or b tangents of z.

    Args:
        update: the update rule that trains θ.
        steps: T, the training steps of one estimate.
        directions: b, or ``None`` for one unit vector per number in λ.
        seed: the random seed of the directions.
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
        check_seed("Forward", self.seed)
        for name, value in (("steps", self.steps), ("directions", self.directions)):
            if value is None and name == "directions":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"Forward: {name} = {value!r}; it must be a positive integer")

    @property
    def training_steps(self) -> int:
        """T."""
        return self.steps

    @property
    def is_exact(self) -> bool:
        return self.directions is None

    def _init(self, backend: Backend, params: Tree) -> State:
        return State(params, as_update_rule(self.update).init(backend, params))

    def _memory(self, backend: Backend, state: State, hparams: Tree) -> Tangents:
        if self.directions is not None:
            return Tangents(None, 0)
        return Tangents(self._zero_tangents(backend, inner_state(state), self._axes(backend, hparams, 0)), 0)

    @property
    def needs_every_step(self) -> bool:
        """True if tangents are kept between estimates."""
        return self.directions is None

    def restarted(self, fresh: State, last: State) -> State:
        """Keep the count of estimates, so that the next random directions are new."""
        return fresh if self.directions is None else fresh._replace(memory=last.memory)

    def _estimate(
        self, backend: Backend, problem: Problem, state: State, hparams: Tree, train: Batches, val: Batches
    ) -> Estimate[Any]:
        training = Training(backend, problem, as_update_rule(self.update))
        batch = batch_series(backend, "train", train, state.step, self.steps)
        memory = state.memory
        if not isinstance(memory, Tangents) or (self.directions is None and memory.z is None):
            memory = self._memory(backend, state, hparams)  # of another estimator: start from zero tangents
        axes = self._axes(backend, hparams, memory.count)
        begin, tangents, reached = self._begin(backend, state, hparams, memory, axes)
        first = 0 if self.start is not None else state.step  # for the optimiser, which a start renews
        training.check_differentiable(begin, hparams, first)
        all_reached = [reached]  # one tree, joined with what each step reaches

        def body(
            carry: tuple[Inner, Any, Observation], k: Any, _: Any
        ) -> tuple[tuple[Inner, Any, Observation], None]:
            z, tangents, observed = carry

            def step(params: Tree, opt_state: Tree, hparams: Tree) -> tuple[Any, tuple[Tree, Observation]]:
                before = Inner(params, opt_state, z.aux)
                after, observed = training.step(before, hparams, batch(k), first + k)
                return after[:2], (after.aux, observed)

            (params, opt_state), push, (aux, later) = backend.linearize(step, z.params, z.opt_state, hparams)
            all_reached[0] = backend.map(or_, all_reached[0], push.reached[2])
            pushed = backend.each(lambda tangent, axis: push(*tangent, axis), tangents, axes)
            return (Inner(params, opt_state, aux), pushed, observed.then(backend, later, k)), None

        unobserved = Observation.none(backend, begin.params, self.steps)
        (final, tangents, observed), _ = backend.scan(body, (begin, tangents, unobserved), self.steps)
        observed = observed._replace(inner_values=backend.dense(observed.inner_values))
        if self.start is not None:
            observed = observed.numbered_from(backend, state.step)
        end = state.step + self.steps
        validation = problem.validation(backend, final.params, hparams, one_batch("val", val, end), final.aux)
        count = self._count(backend, hparams)

        def add(total: Tree, i: Any, _: Any) -> tuple[Tree, None]:
            slope = backend.inner(validation.v, backend.take(tangents, i)[0])
            return backend.axpy(slope, backend.take(axes, i), total), None

        response, _ = backend.scan(add, backend.zeros(hparams), count)
        if count < vectors.size(backend, hparams):
            response = vectors.scale(backend, 1.0 / count, response)
        next_tangents = None if self.directions is not None else tangents
        return assemble(
            backend,
            validation,
            response,
            all_reached[0],
            observed,
            state_after(state, final, end)._replace(memory=Tangents(next_tangents, memory.count + 1)),
            Spent(
                self.steps + 1,
                self.steps * count,
                count * vectors.nbytes(backend, (final.params, final.opt_state)),
            ),
            None if self.allow_unused else used_by_inner(backend, problem, begin, hparams, lambda: batch(0)),
        )

    def _begin(
        self, backend: Backend, state: State, hparams: Tree, memory: Tangents, axes: Any
    ) -> tuple[Inner, Any, Tree]:
        """Return z_0, its tangents, and which hyperparameters reach it."""
        z, start, rule = inner_state(state), self.start, as_update_rule(self.update)
        if start is None:
            reached = backend.map(lambda _: False, hparams)
            return z, memory.z if self.directions is None else self._zero_tangents(backend, z, axes), reached
        make = start_map(backend, start, rule, state)
        begin, push, _ = backend.linearize(lambda hparams: (make(hparams), None), hparams)
        return begin, backend.each(lambda axis: tuple(push(axis)[:2]), axes), push.reached[0]

    @staticmethod
    def _zero_tangents(backend: Backend, z: Inner, axes: Any) -> Any:
        return backend.each(lambda _: (backend.zeros(z.params), backend.zeros(z.opt_state)), axes)

    def _count(self, backend: Backend, hparams: Tree) -> int:
        n = vectors.size(backend, hparams)
        return n if self.directions is None else min(self.directions, n)

    def _axes(self, backend: Backend, hparams: Tree, count: Any) -> Any:
        """Return trees like λ: a basis, or orthogonal directions of length √n."""
        flat, unravel = backend.ravel(hparams)
        n, b = vectors.size(backend, hparams), self._count(backend, hparams)
        if n == 0:
            return backend.empty_rows(hparams, 0)
        if b == n:
            basis = backend.asarray(np.eye(n), like=flat)
            return backend.each(unravel, backend.stack([basis[i] for i in range(n)]))
        spec = backend.describe(flat)
        wide = flat if spec.itemsize >= 4 else backend.cast(flat, "float32")  # eigh needs at least 32 bits
        drawn = backend.random.normal(self.seed, count, (n, b), wide)
        for _ in range(2):  # the second pass removes the rounding error of the first
            drawn = _orthonormal(backend, drawn)
        rows = backend.cast(n**0.5 * drawn.T, spec.dtype)
        return backend.each(unravel, backend.stack([rows[j] for j in range(b)]))


def _orthonormal(backend: Backend, x: Any) -> Any:
    """Return the polar factor x (xᵀx)^(−1/2): the nearest orthonormal columns, uniform if x is normal."""
    values, axes = backend.xp.linalg.eigh(x.T @ x)
    return x @ (axes * values**-0.5) @ axes.T
