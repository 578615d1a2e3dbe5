"""Optax transformations as update rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import jax
import jax.numpy as jnp

from hypergrad.backend import Backend, Scalar, Tree
from hypergrad.errors import ArgumentError
from hypergrad.updates import UpdateRule, register_optimiser


@final
@dataclass(frozen=True)
class Optax(UpdateRule):
    r"""Any ``optax.GradientTransformation`` as an update rule, differentiated through by JAX itself.

        updates, state ← transformation.update(∇C̃1, state, θ),   θ ← θ + updates

    Estimators and `Tuner` take a transformation as it is, ``hg.Greedy(optax.adam(1e-3))``; this class is for
    those whose own rates are hyperparameters::

        tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        hg.Greedy(Optax(tx, {"learning_rate": lambda h: h["lr"]}))

    Optax's Adam and its kin divide by √s, whose derivative at s = 0 is infinite: where a gradient may be
    exactly zero pass ``eps_root``, or take `hg.Adam`, which is exact there.

    Args:
        transformation: made by optax.
        hyperparams: for each name that ``optax.inject_hyperparams`` holds, a function of λ.

    Raises:
        ArgumentError: when used, if a name is not among those held.
    """

    transformation: Any
    hyperparams: Mapping[str, Callable[[Tree], Scalar]] = field(default_factory=dict)

    def init(self, backend: Backend, params: Tree) -> Tree:
        return self.transformation.init(params)

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        if self.hyperparams:
            opt_state = self._injected(opt_state, hparams)
        updates, new = self.transformation.update(gradient, opt_state, params)
        moved = jax.tree_util.tree_map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        return moved, new

    def _injected(self, opt_state: Tree, hparams: Tree) -> Tree:
        """The optimiser's state with its hyperparameters replaced by functions of λ."""
        missing = set(self.hyperparams)

        def fill(node: Any) -> Any:
            if not _holds(node):
                return node
            held = dict(node.hyperparams)
            for name in set(self.hyperparams) & set(held):
                held[name] = jnp.asarray(self.hyperparams[name](hparams), jnp.result_type(held[name]))
                missing.discard(name)
            return node._replace(hyperparams=held)

        filled = jax.tree_util.tree_map(fill, opt_state, is_leaf=_holds)
        if missing:
            raise ArgumentError(
                f"Optax: the transformation holds no hyperparameter {', '.join(sorted(missing))}; wrap it in "
                "optax.inject_hyperparams"
            )
        return filled


def _holds(node: Any) -> bool:
    return hasattr(node, "hyperparams") and hasattr(node, "_replace")


register_optimiser("optax.GradientTransformation", Optax)
register_optimiser("optax.GradientTransformationExtraArgs", Optax)
register_optimiser("optax.MultiSteps", Optax)
