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
    """Give x = A⁻¹v its derivatives: start from it as a constant, and correct it once for each derivative.

    A correction x ← x + A⁻¹(v − A x) adds 0 to x and makes one more order of its derivatives correct. In it
    A⁻¹ is a constant, whose pullback is a solve with Aᵀ. Cost: one solve, and one with Aᵀ for each pullback
    of each derivative.

    Args:
        backend: the backend of the arrays.
        depth: leaf ↦ the number of derivatives that are being taken through it.
        zeros_with_pullback: ``(y, pull)`` ↦ zeros like y, whose pullback is ``pull``.
        solve_derivative: ``(matvec, v) -> (x, aux)``, for the solves with Aᵀ.
        symmetric: whether A is its own transpose.

    Raises:
        UnsupportedOpError: in a pullback, if its derivative is of a higher order than x has been given.
    """

    backend: Backend
    depth: Callable[[Any], int]
    zeros_with_pullback: Callable[[Any, Callable[[Any], Any]], Any]
    solve_derivative: Callable[..., tuple[Tree, Tree]]
    symmetric: bool

    def __call__(
        self, matvec: Callable[[Tree], Tree], v: Tree, solve: Callable[..., Any], orders: int | None = None
    ) -> tuple[Tree, Tree]:
        """Return x and aux, with ``orders`` derivatives, by default as many as v and A v have."""
        backend = self.backend
        depths = [self.depth(leaf) for leaf in backend.flatten(v)[0]]

        product_depth: list[int] = []

        def product(p: Tree) -> Tree:
            image = matvec(p)
            if not product_depth:  # it is the same for every product
                product_depth.append(max(depths + [self.depth(leaf) for leaf in backend.flatten(image)[0]]))
            return backend.detach(image) if product_depth[0] else image

        x, aux = solve(product, backend.detach(v))
        depth = product_depth[0] if product_depth else max(depths)
        if depth == 0:
            return x, aux
        x, orders = backend.detach(x), depth if orders is None else orders

        def transposed(p: Tree) -> Tree:
            return matvec(p) if self.symmetric else backend.pullback(matvec, backend.zeros(v))[1](p)[0]

        def pull(g: Any) -> Any:
            if orders == 0:
                raise UnsupportedOpError(
                    "this derivative of a linear solve has a higher order than those that were being taken "
                    "during the solve: hypergradient(differentiable=True) allows one more"
                )
            return backend.ravel(self(transposed, unravel(g), self.solve_derivative, orders - 1)[0])[0]

        for _ in range(max(orders, 1)):
            flat, unravel = backend.ravel(backend.axpy(-1.0, matvec(x), v))
            x = backend.axpy(1.0, unravel(self.zeros_with_pullback(flat, pull)), x)
        return x, backend.detach(aux)
