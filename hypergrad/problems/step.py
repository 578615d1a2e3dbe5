"""The update map Φ: one step of training, as a differentiable function of everything it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.finite import first_nonfinite, search_nonfinite
from hypergrad.problems.base import Problem
from hypergrad.updates import UpdateRule


class Inner(NamedTuple):
    """The inner state z = (θ, optimiser state), on which Φ acts, and the auxiliary state beside it.

    Nothing is differentiated by the auxiliary state: its cotangents are zeros.
    """

    params: Tree
    opt_state: Tree
    aux: Tree = None


class Observation(NamedTuple):
    """What training showed, detached from every derivative.

    ``bad_step`` is the first step at which the loss, its gradient or the update was not finite, −1 if
    there was none; ``bad_leaf`` is the leaf of the gradient or update, −1 if it was the loss.
    ``inner_values`` are the losses of all steps, as rows, where they are collected.
    """

    inner_value: Scalar
    gradient_norm: Scalar
    bad_step: Any = -1
    bad_leaf: Any = -1
    inner_values: Any = None

    @classmethod
    def none(cls, backend: Backend, params: Tree, length: int | None = None) -> Observation:
        """Return the observation before the first step: NaN, wide enough for what follows.

        With half-precision parameters, norms are float32, and losses may be. With ``length``, the losses of
        so many steps are collected.
        """
        nan = backend.asarray(float("nan"), like=backend.flatten(params)[0][0])
        wide = backend.inner(nan, nan)
        return cls(wide, wide, inner_values=None if length is None else backend.empty_rows(wide, length))

    def numbered_from(self, backend: Backend, start: Any) -> Observation:
        """Return the observation of steps that were counted from 0, counted from a start instead."""
        bad = backend.xp.where(self.bad_step < 0, self.bad_step, self.bad_step + start)
        return self._replace(bad_step=bad)

    def then(self, backend: Backend, later: Observation, k: Any = None) -> Observation:
        """Combine with a later observation: take its values, and the first fault of the two.

        With k, it is that of the k-th of the steps whose losses are collected.
        """
        where, fine = backend.xp.where, self.bad_step < 0
        # Adding zeros casts the values to the dtypes that they had before.
        zeros = backend.zeros((self.inner_value, self.gradient_norm))
        value, norm = backend.axpy(1.0, (later.inner_value, later.gradient_norm), zeros)
        values = self.inner_values
        if values is not None and k is not None:
            values = backend.set_row(values, k, value)
        return Observation(
            value,
            norm,
            where(fine, later.bad_step, self.bad_step),
            where(fine, later.bad_leaf, self.bad_leaf),
            values,
        )

    def joined(self, backend: Backend, later: Observation) -> Observation:
        """Combine with the observation of the steps that follow, all of whose losses were collected."""
        values = [backend.dense(x.inner_values) for x in (self, later) if x.inner_values is not None]
        joined = values[0] if len(values) == 1 else backend.xp.concatenate(values)
        return self.then(backend, later)._replace(inner_values=joined)


@final
@dataclass(frozen=True)
class Training:
    r"""Training on C̃1 by an update rule:

        z_{t+1} = Φ(z_t, λ, batch_t),    z = (θ, optimiser state)

    A step costs one gradient, and the graph of this gradient if a derivative is needed.
    """

    backend: Backend
    problem: Problem
    update: UpdateRule

    def step(self, z: Inner, hparams: Tree, batch: Tree, t: Any) -> tuple[Inner, Observation]:
        """Take one step: apply Φ.

        Raises:
            ArgumentError: if the loss is not scalar, or the update changes a shape.
            DisconnectedError: if the loss does not depend on the parameters.
        """
        backend = self.backend
        value, gradient, aux = inner_gradient(backend, self.problem, z, hparams, batch)
        new = self.apply(gradient, z, hparams, t)._replace(aux=aux)
        return new, observe(backend, value, gradient, new.params, t, self.update.leafwise)

    def check_differentiable(self, z: Inner, hparams: Tree, t: Any) -> None:
        """Check that a step can be differentiated by what the gradient depends on.

        Raises:
            DisconnectedError: if the update cuts the gradient off.
        """
        self.update.check_connected(self.backend, z.opt_state, z.params, hparams, t)

    def advance(self, z: Inner, hparams: Tree, batch: Tree, t: Any) -> tuple[Inner, Scalar]:
        """Like `step`, but with the loss in place of an observation: for a step that is replayed."""
        value, gradient, aux = inner_gradient(self.backend, self.problem, z, hparams, batch)
        return self.apply(gradient, z, hparams, t)._replace(aux=aux), value

    def apply(self, gradient: Tree, z: Inner, hparams: Tree, t: Any) -> Inner:
        """Apply the optimiser's half of Φ: new parameters from a gradient."""
        params, opt_state = self.update.checked(self.backend, gradient, z.opt_state, z.params, hparams, t)
        return Inner(params, opt_state, z.aux)


def inner_gradient(
    backend: Backend, problem: Problem, z: Inner, hparams: Tree, batch: Tree
) -> tuple[Scalar, Tree, Tree]:
    """Return C̃1, ∇_θ C̃1 as a differentiable function of θ and λ, and the next auxiliary state."""
    # Losses may write into copies of it, which no graph allows for a variable.
    aux = None if z.aux is None else backend.detach(z.aux)
    return problem.inner_gradient(backend, z.params, hparams, batch, aux)


def observe(
    backend: Backend, value: Scalar, gradient: Tree, updated: Tree, t: Any, leafwise: bool = False
) -> Observation:
    """Record the loss, the norm of its gradient, and the first number that is not finite.

    This may be the loss, a leaf of its gradient, or a leaf of the ``updated`` parameters. If the update is
    ``leafwise``, the updated parameters show faults of the gradient too.
    """
    where = backend.xp.where
    value, gradient, updated = backend.detach((value, gradient, updated))
    norm = vectors.norm(backend, gradient)
    # A finite norm shows that the gradient is finite; a non-finite one may be a mere overflow. If the norm
    # cannot be read, checking the updated parameters alone is cheapest: in a small net, a pass over the
    # gradient costs a tenth of computing it, and a branch in the program costs half.
    finite = bool(backend.xp.isfinite(norm)) if backend.readable(norm) else leafwise
    in_gradient = -1 if finite else search_nonfinite(backend, gradient)
    in_update = first_nonfinite(backend, updated)
    leaf = where(in_gradient < 0, in_update, in_gradient)
    fine = backend.xp.isfinite(value)
    bad_step = where(fine, where(leaf < 0, -1, t), t)
    return Observation(value, norm, bad_step, where(fine, leaf, -1))
