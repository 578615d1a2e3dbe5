"""Operations of JAX without derivatives: errors that name them and say what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hypergrad.errors import UnsupportedOpError, explain

_FAULTS = {
    r"Reverse-mode differentiation does not work for lax\.while_loop": (
        "lax.while_loop, or lax.fori_loop with a traced bound,",
        "give the loop a length: lax.scan, or lax.fori_loop with Python bounds; a loop to a fixed point "
        "belongs in lax.custom_root or a jax.custom_vjp",
    ),
    r"callbacks? do(?:es)? not support J?VJ?P": (
        "a callback to Python",
        "write it in JAX, or wrap it in jax.custom_vjp with a backward pass in JAX's own operations",
    ),
}

_DIFFERENCES = "if only the second derivative is missing: take differences, products=hg.FiniteDifference()"


@contextmanager
def translated() -> Iterator[None]:
    """Inside this block, JAX's errors about missing derivatives are raised as `UnsupportedOpError`.

    Others pass unchanged.

    Raises:
        UnsupportedOpError: naming the operation.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        for pattern, (op, remedy) in _FAULTS.items():
            if not isinstance(error, UnsupportedOpError) and re.search(pattern, str(error)):
                raise UnsupportedOpError(
                    explain(
                        f"{op} inside of a loss cannot be differentiated in reverse as often as needed",
                        "The hypergradient needs the training gradient, and its derivative.",
                        (remedy, _DIFFERENCES),
                    )
                ) from error
        raise
