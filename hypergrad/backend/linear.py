"""The derivatives of a linear solve, where a framework lets one define a pullback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypergrad.backend.protocol import Backend
from hypergrad.backend.types import Tree
from hypergrad.errors import UnsupportedOpError


@dataclass(frozen=True)
class LinearSolve:
    """x = A⁻¹v as a constant x̂, corrected by x ← x + A⁻¹(v − A x) once for each derivative.

    Each correction adds 0 to x and makes one more of its derivatives right. A⁻¹ is a constant in it, whose
    pullback is a solve with Aᵀ. Cost: one solve, and one with Aᵀ for each pullback of each derivative.

    Args:
        backend: of the arrays.
        depth: a leaf ↦ how many derivatives pass through it.
        zeros_with_pullback: ``(y, pull)`` ↦ zeros like y, whose pullback is ``pull``.
        solve_derivative: ``(matvec, v) -> (x, aux)``, for the solves with Aᵀ.
        symmetric: is A its own transpose?

    Raises:
        UnsupportedOpError: in a pullback, if a derivative of a higher order is taken than was announced.
    """

    backend: Backend
    depth: Callable[[Any], int]
    zeros_with_pullback: Callable[[Any, Callable[[Any], Any]], Any]
    solve_derivative: Callable[..., tuple[Tree, Tree]]
    symmetric: bool

    def __call__(
        self, matvec: Callable[[Tree], Tree], v: Tree, solve: Callable[..., Any], orders: int | None = None
    ) -> tuple[Tree, Tree]:
        """Return x and aux, with ``orders`` derivatives, or as many as pass through v and A v."""
        backend = self.backend
        depths = [self.depth(leaf) for leaf in backend.flatten(v)[0]]

        deepest: list[int] = []

        def product(p: Tree) -> Tree:
            image = matvec(p)
            if not deepest:  # through every image pass as many
                deepest.append(max(depths + [self.depth(leaf) for leaf in backend.flatten(image)[0]]))
            return backend.detach(image) if deepest[0] else image

        x, aux = solve(product, backend.detach(v))
        passing = deepest[0] if deepest else max(depths)
        if passing == 0:
            return x, aux
        x, orders = backend.detach(x), passing if orders is None else orders

        def transposed(p: Tree) -> Tree:
            return matvec(p) if self.symmetric else backend.pullback(matvec, backend.zeros(v))[1](p)[0]

        def pull(g: Any) -> Any:
            if orders == 0:
                raise UnsupportedOpError(
                    "a derivative of a linear solve was asked for that is of a higher order than those being "
                    "taken when it was solved: hypergradient(differentiable=True) is good for one more"
                )
            return backend.ravel(self(transposed, unravel(g), self.solve_derivative, orders - 1)[0])[0]

        for _ in range(max(orders, 1)):
            flat, unravel = backend.ravel(backend.axpy(-1.0, matvec(x), v))
            x = backend.axpy(1.0, unravel(self.zeros_with_pullback(flat, pull)), x)
        return x, backend.detach(aux)
