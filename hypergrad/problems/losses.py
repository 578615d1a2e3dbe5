"""Losses as functions of θ and λ, checked as they are evaluated."""

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
    """Evaluate a loss with its batch filled in, and keep its graph: ``value, pullback, aux``.

    The auxiliary state that it returns is a constant for every derivative, outer ones too.

    Raises:
        ArgumentError: if it is not scalar.
        LeafTypeError: if a batch or a constant made it wider than the parameters.
        DisconnectedError: if no parameter reaches it.
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
                    "values taken out of the framework): keep them in its own operations, which for "
                    "NumPy are those of autograd.numpy",
                    "the loss reads parameters from elsewhere: use those that it is given",
                ),
            ),
            "params",
        )
    return value, pullback, None if aux is None else backend.detach(aux)
