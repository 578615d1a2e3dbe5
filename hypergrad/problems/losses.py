"""Losses as functions of θ and λ, evaluated with checks."""

from __future__ import annotations

from collections.abc import Callable

from hypergrad.backend import Backend, Pullback, Scalar, Tree
from hypergrad.backend.arguments import check_batch, check_loss
from hypergrad.errors import DisconnectedError, explain


def evaluate(
    backend: Backend,
    name: str,
    loss: Callable[..., tuple[Scalar, Tree]],
    batch: Tree,
    params: Tree,
    *hparams: Tree,
) -> tuple[Scalar, Pullback, Tree]:
    """Evaluate a loss on a batch and keep its graph: return ``value, pullback, aux``.

    The returned auxiliary state is a constant for every derivative, outer ones included.

    Raises:
        ArgumentError: if the loss is not scalar.
        LeafTypeError: if a batch or a constant made the loss wider than the parameters.
        DisconnectedError: if the loss does not depend on the parameters.
    """
    check_batch(backend, "train" if name == "inner" else "val", batch, params)

    label = f"{name} (the {'T1' if name == 'inner' else 'T2'} loss)"

    def checked(*variables: Tree) -> tuple[Scalar, Tree]:
        value, aux = loss(*variables)
        check_loss(backend, label, value, params)
        return value, aux

    value, pullback, aux = backend.vjp(checked, params, *hparams)
    if not any(backend.flatten(pullback.reached[0])[0]):
        raise DisconnectedError(
            explain(
                f"{label} does not depend on any leaf of params",
                "Its gradient would be zero everywhere, and so would the hypergradient.",
                (
                    "the parameters were detached inside the loss (a stop-gradient, `no_grad`, or "
                    "values converted out of the framework): use the framework's own operations, for "
                    "NumPy those of autograd.numpy",
                    "the loss reads parameters from elsewhere: use those that are passed to it",
                ),
            ),
            "params",
        )
    return value, pullback, None if aux is None else backend.detach(aux)
