"""The update map Φ: one step of training, as a differentiable function of everything it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.backend.arguments import check_same
from hypergrad.backend.finite import first_nonfinite, search_nonfinite
from hypergrad.problems.base import Problem
from hypergrad.updates import UpdateRule


class Inner(NamedTuple):
    """The inner state z = (θ, optimiser state), on which Φ acts, and the auxiliary state that rides along.

    Nothing is differentiated by the latter: its cotangents are zeros.
    """

    params: Tree
    opt_state: Tree
    aux: Tree = None


class Observation(NamedTuple):
    """What training showed, detached from every derivative.

    ``bad_step`` is the first step at which the loss, its gradient or the update was not finite, −1 if
    there was none; ``bad_leaf`` the leaf of gradient or update, −1 if it was the loss.
    """

    inner_value: Scalar
    gradient_norm: Scalar
    bad_step: Any = -1
    bad_leaf: Any = -1

    @classmethod
    def none(cls, backend: Backend, params: Tree) -> Observation:
        """Before the first step. Losses of half-precision parameters may come in float32, and norms do."""
        nan = backend.asarray(float("nan"), like=backend.flatten(params)[0][0])
        wide = backend.inner(nan, nan)
        return cls(wide, wide)

    def then(self, backend: Backend, later: Observation) -> Observation:
        """Join with a later step: its values, and the first fault of both."""
        where, fine = backend.xp.where, self.bad_step < 0
        kinds = backend.zeros((self.inner_value, self.gradient_norm))
        value, size = backend.axpy(1.0, (later.inner_value, later.gradient_norm), kinds)
        return Observation(
            value,
            size,
            where(fine, later.bad_step, self.bad_step),
            where(fine, later.bad_leaf, self.bad_leaf),
        )


@final
@dataclass(frozen=True)
class Training:
    r"""Training on C̃1 by an update rule:

        z_{t+1} = Φ(z_t, λ, batch_t),    z = (θ, optimiser state)

    A step costs one gradient, and a graph of it if a derivative is being taken.
    """

    backend: Backend
    problem: Problem
    update: UpdateRule

    def step(self, z: Inner, hparams: Tree, batch: Tree, t: Any) -> tuple[Inner, Observation]:
        """Φ itself.

        Raises:
            ArgumentError: if the loss is not scalar, or the update changes a shape.
            DisconnectedError: if the loss does not depend on the parameters.
        """
        backend = self.backend
        value, gradient, aux = inner_gradient(backend, self.problem, z, hparams, batch)
        new = self.apply(gradient, z, hparams, t)._replace(aux=aux)
        return new, observe(backend, value, gradient, new.params, t, self.update.leafwise)

    def advance(self, z: Inner, hparams: Tree, batch: Tree, t: Any) -> Inner:
        """Like `step`, but observes nothing: for a step that is replayed."""
        _, gradient, aux = inner_gradient(self.backend, self.problem, z, hparams, batch)
        return self.apply(gradient, z, hparams, t)._replace(aux=aux)

    def apply(self, gradient: Tree, z: Inner, hparams: Tree, t: Any) -> Inner:
        """The optimiser's half of Φ: new parameters from a gradient."""
        name = type(self.update).__name__
        try:
            params, opt_state = self.update.update(self.backend, gradient, z.opt_state, z.params, hparams, t)
        except Exception:
            # The most likely cause, said in words, is an optimiser's state made for other parameters.
            fresh = self.update.init(self.backend, z.params)
            check_same(self.backend, name, z.opt_state, "opt_state", fresh)
            raise
        check_same(self.backend, name, params, "params", z.params)
        check_same(self.backend, name, opt_state, "opt_state", z.opt_state)
        return Inner(params, opt_state, z.aux)


def inner_gradient(
    backend: Backend, problem: Problem, z: Inner, hparams: Tree, batch: Tree
) -> tuple[Scalar, Tree, Tree]:
    """C̃1 and ∇_θ C̃1, as a differentiable function of θ and λ, and the next auxiliary state."""
    return problem.inner_gradient(backend, z.params, hparams, batch, z.aux)


def observe(
    backend: Backend, value: Scalar, gradient: Tree, moved: Tree, t: Any, leafwise: bool = False
) -> Observation:
    """Note the value, the norm of the gradient, and where a number stopped being finite.

    That may be the loss, a leaf of its gradient, or a leaf of the parameters that the update ``moved``, which
    shows both if the update is ``leafwise``.
    """
    where = backend.xp.where
    value, gradient, moved = backend.detach((value, gradient, moved))
    size = vectors.norm(backend, gradient)
    # A finite norm shows that the gradient is finite; one that is not may have overflowed. Where that cannot
    # be read, one look at the parameters costs least: a pass over the gradient is a tenth of taking it in a
    # small net, and a branch in the program half of it.
    sound = bool(backend.xp.isfinite(size)) if backend.readable(size) else leafwise
    slope = -1 if sound else search_nonfinite(backend, gradient)
    after = first_nonfinite(backend, moved)
    leaf = where(slope < 0, after, slope)
    fine = backend.xp.isfinite(value)
    bad_step = where(fine, where(leaf < 0, -1, t), t)
    return Observation(value, size, bad_step, where(fine, leaf, -1))
