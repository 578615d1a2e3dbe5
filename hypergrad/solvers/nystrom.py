"""Low-rank approximations of the Hessian from random columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from hypergrad.backend import Tree, vectors
from hypergrad.errors import ArgumentError, Failure
from hypergrad.solvers.base import (
    ApproximateInverse,
    Prepared,
    check_count,
    check_seed,
    check_size,
    check_tolerance,
    rounding,
)
from hypergrad.solvers.system import Solution, System


@final
@dataclass(frozen=True)
class Nystrom(ApproximateInverse):
    r"""The Nyström approximation of a positive semidefinite H, inverted by Woodbury's identity.

        H ≈ (HΩ) (Ωᵀ HΩ)⁺ (HΩ)ᵀ = U Λ Uᵀ,    Ω: n × rank
        x = U (Λ + ρ)⁻¹ Uᵀ v + (v − U Uᵀ v) / ρ             as a solver
        M ∝ U (Λ + ρ)⁻¹ Uᵀ + (I − U Uᵀ) / (λ_min(Λ) + ρ)    as a preconditioner of `CG`

    As a solver it treats all directions outside of the rank as having curvature ρ, a bias that the residual
    in the report shows (Hataya and Yamada 2023). As a preconditioner it does not change the solution, and
    saves products if few eigenvalues are large (Frangella, Tropp and Udell 2023, eq. 1.3).

    Cost: ``rank`` products, computed in parallel where the framework can vectorise them, and as many vectors.

    Args:
        rank: the number of columns of Ω, at most n for n unknowns.
        damping: ρ > 0.
        columns: draw Ω from the columns of the identity, so that HΩ are columns of H itself, instead of from
            a normal distribution. Normal Ω approximate better; columns of H may be sparse.
        seed: the random seed of Ω.
        rtol: the relative residual above which a solution counts as failed; by default nothing is promised.

    Raises:
        ArgumentError: if the rank or the damping is not positive, or the seed is not an integer ≥ 0.
    """

    rank: int = 20
    damping: float = 1e-2
    columns: bool = False
    seed: int = 0
    rtol: float | None = None

    def __post_init__(self) -> None:
        check_count("Nystrom", "rank", self.rank)
        check_tolerance("Nystrom", self.rtol)
        check_size("Nystrom", "damping", self.damping)
        check_seed("Nystrom", self.seed)
        if self.damping == 0:
            raise ArgumentError("Nystrom: damping = 0; directions outside of the rank need a curvature > 0")

    @property
    def needs_symmetry(self) -> bool:
        return True

    def prepare(self, system: System) -> Prepared:
        # Outside of the rank the curvature is at most that of the last direction in it.
        return self._inverse(system, lambda values: system.backend.xp.min(values))

    def solve(self, system: System, memory: Tree | None = None) -> Solution:
        system, inverse = system.begun(), self._inverse(system, lambda values: 0.0)
        x = vectors.add(system.backend, system.x, inverse.apply(system.r))
        return Solution(x, 1, inverse.products + system.spent, inverse.failure, inverse.curvature)

    def _inverse(self, system: System, rest: Callable[[Any], Any]) -> Prepared:
        backend = system.backend
        unravel, rho = backend.ravel(system.v)[1], self.damping
        u, values, failure, products = self._spectrum(system)
        outside = rest(values) + rho

        def apply(p: Tree) -> Tree:
            flat = backend.ravel(p)[0]
            along = u.T @ flat
            # Project twice: what rounding leaves of U would be divided by ρ alone.
            across = flat - u @ along
            across = across - u @ (u.T @ across)
            return unravel(u @ (along / (values + rho)) + across / outside)

        return Prepared(apply, products, failure, backend.xp.max(values))

    def _spectrum(self, system: System) -> tuple[Any, Any, Any, int]:
        """Return U, Λ, the failure if H has negative curvature, and the products spent."""
        backend, xp = system.backend, system.backend.xp
        flat, unravel = backend.ravel(system.v)
        n = vectors.size(backend, system.v)
        rank = min(self.rank, n)
        if self.columns:
            indices = np.random.default_rng(self.seed).choice(n, rank, replace=False)
            omega = backend.asarray(np.eye(n)[indices], like=flat)
        else:
            omega = backend.random.normal(self.seed, 0, (rank, n), flat)
        rows = backend.stack([omega[i] for i in range(rank)])
        image = backend.dense(backend.each(lambda w: backend.ravel(system.product(unravel(w)))[0], rows))
        core = omega @ image.T
        s, q = xp.linalg.eigh(0.5 * (core + core.T))
        negligible = s <= 10 * rank * rounding(backend, flat) * xp.max(xp.abs(s))
        root = xp.where(negligible, 0.0 * s, 1.0 / xp.sqrt(xp.where(negligible, xp.ones_like(s), s)))
        u, sigma, _ = xp.linalg.svd((image.T @ q) * root, full_matrices=False)
        negative = xp.min(s) < -(rounding(backend, flat) ** 0.5) * xp.max(xp.abs(s))
        failure = xp.where(negative, int(Failure.NEGATIVE_CURVATURE), int(Failure.NONE))
        return u, sigma * sigma, failure, rank
