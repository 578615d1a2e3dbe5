"""Operations without a derivative in HIPS autograd."""

from __future__ import annotations

import re

from hypergrad.errors import UnsupportedOpError, explain

_NOT_DEFINED = re.compile(r"VJP of (?P<op>\S+) (?:wrt argnums .*)?not defined")


def name_operation(error: NotImplementedError) -> None:
    """Raise an error that names the operation, if ``error`` is autograd's for one without a derivative.

    Raises:
        UnsupportedOpError: with the remedies.
    """
    found = _NOT_DEFINED.match(str(error))
    if found is None:
        return
    raise UnsupportedOpError(
        explain(
            f"{found['op']} has no derivative in autograd",
            "The hypergradient needs the first and the second derivative of the training loss.",
            (
                "only the second one is missing: take the mixed term by finite differences of first-order "
                "gradients, products=hg.FiniteDifference()",
                "it is a function of yours: give it a rule, autograd.extend.defvjp, that is itself written "
                "in operations of autograd.numpy",
                "autograd has no rule for it: compose it of other operations of autograd.numpy",
            ),
        )
    ) from error
