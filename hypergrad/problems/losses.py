"""Losses as functions of θ and λ, evaluated with checks."""

from __future__ import annotations

from collections.abc import Callable

from hypergrad.backend import Backend, Pullback, Scalar, Tree
from hypergrad.backend.arguments import check_batch, check_loss
from hypergrad.errors import DisconnectedError, ZeroResponseWarning, explain, warn


def evaluate(
    backend: Backend,
    name: str,
    loss: Callable[..., tuple[Scalar, Tree]],
    batch: Tree,
    params: Tree,
    *hparams: Tree,
    constants: Tree = None,
) -> tuple[Scalar, Pullback, Tree]:
    """Evaluate a loss on a batch and keep its graph: return ``value, pullback, aux``.

    ``constants`` are hyperparameters that the loss reads and by which no derivative is taken. The returned
    auxiliary state is a constant for every derivative, outer ones included.

    Raises:
        ArgumentError: if the loss is not scalar.
        LeafTypeError: if a batch or a constant made the loss wider than the parameters.
        DisconnectedError: if the loss does not depend on the parameters; C2 may depend on the hyperparameters
            alone.

    Warns:
        ZeroResponseWarning: if C2 depends on the hyperparameters alone.
    """
    check_batch(backend, "train" if name == "inner" else "val", batch, params)

    label = f"{name} (the {'T1' if name == 'inner' else 'T2'} loss)"

    def checked(*variables: Tree) -> tuple[Scalar, Tree]:
        with backend.as_called():
            value, aux = loss(*variables)
        check_loss(backend, label, value, params, hparams[0] if hparams else constants)
        return value, aux

    value, pullback, aux = backend.vjp(checked, params, *hparams)
    uses_params, *uses = (any(backend.flatten(tree)[0]) for tree in pullback.reached)
    if not uses_params and name == "outer" and any(uses) and _is_constant(backend, loss, params, hparams):
        warn(
            explain(
                f"{label} does not depend on any leaf of params",
                "Its hypergradient is the direct term ∂_λ C2 alone: training has no part in it.",
                (
                    "C2 is meant so, as an upper-level constraint is",
                    "the loss reads parameters from elsewhere: use those that are passed to it",
                ),
            ),
            ZeroResponseWarning,
        )
    elif not uses_params:
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


def _is_constant(
    backend: Backend, loss: Callable[..., tuple[Scalar, Tree]], params: Tree, hparams: tuple[Tree, ...]
) -> bool:
    """Does the value stay the same at other parameters? If not, they were detached. Costs an evaluation."""
    moved = backend.axpy(0.1, backend.map(backend.xp.ones_like, params), params)
    with backend.random.replay(backend.random.state()):
        before, after = (loss(theta, *hparams)[0] for theta in (params, moved))
    values = backend.detach((before, after))
    return backend.readable(*values) and bool(values[0] == values[1])
