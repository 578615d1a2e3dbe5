r"""A bound on the error of a hypergradient by the implicit function theorem.

With G(θ, λ) = 0 solved up to ‖G‖ and (∂_θ G)ᵀ x = ∂_θ C2 up to r, the error is of first order in both
(Pedregosa 2016, theorem 1).
"""

from __future__ import annotations

from hypergrad.backend import Backend, Scalar, Tree, find_backend, vectors
from hypergrad.errors import ArgumentError
from hypergrad.estimators import Implicit
from hypergrad.estimators.adjoint import solve_adjoint
from hypergrad.estimators.assembly import inner_state
from hypergrad.problems import Problem, Validation
from hypergrad.problems.batches import Batches, every_batch, one_batch
from hypergrad.problems.condition import Condition
from hypergrad.second_order import GaussNewton
from hypergrad.solvers.solve import check_symmetry

_PROBES = 4


def error_bound(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    train: Batches,
    val: Batches,
    estimator: Implicit,
    *,
    aux: Tree = None,
    backend: Backend | str | None = None,
) -> Scalar:
    r"""Return the error bound of Pedregosa 2016 (HOAG), theorem 1, with constants measured at this point.

        ‖ĝ − dC2/dλ‖ ≤ M/μ ‖r‖ + (L_D + M/μ L_r) ‖G‖/μ

    for D = ∂_λ C2 − (∂_λ G)ᵀ x and r = ∂_θ C2 − (∂_θ G)ᵀ x, in which ∂_θ G is the curvature of G itself,
    without damping. M ≈ ‖∂_λ G‖ is measured in random directions, μ is the smallest curvature that the solver
    met, and L_D and L_r are the rates at which D and r change with θ along −G. If G is smooth and these
    constants hold everywhere around θ, this is a bound; as each is measured in one direction, it is an
    estimate of a bound.

    Cost: that of the estimate, and 2 gradients and 6 products more.

    Args:
        problem, params, hparams, train, val, aux: as for `hypergrad.hypergradient`.
        estimator: the `Implicit` whose error is bounded.
        backend: found from the arrays if it is not given.

    Returns:
        A scalar, in the units of the hypergradient's norm. It is NaN if the solver met no curvature, as
        solvers that are not Krylov methods do not, or none larger than its shift δ.

    Raises:
        ArgumentError: for other estimators, for `GaussNewton`, which is not the curvature of C̃1, and if G
            is not available.
    """
    if not isinstance(estimator, Implicit):
        raise ArgumentError(f"error_bound is for Implicit estimates, not for those of {estimator!r}")
    if isinstance(estimator.products, GaussNewton):
        raise ArgumentError(
            "error_bound needs the curvature of C̃1 itself: use hg.Exact() or hg.FiniteDifference()"
        )
    backend = find_backend(params, hparams, backend=backend)
    with backend.random.turn(problem):
        state = estimator.init(problem, params, hparams, aux=aux, backend=backend)
        check_symmetry(estimator.solver, problem.symmetric)
        z, batches, val = inner_state(state), every_batch("train", train, 0), one_batch("val", val, 0)
        xp, random_state = backend.xp, backend.random.state()

        def evaluate(params: Tree) -> tuple[Condition, Validation]:
            with backend.random.replay(random_state):
                condition = estimator.products.of(
                    backend, problem, z._replace(params=params), hparams, batches
                )
                return condition, problem.validation(backend, params, hparams, val, z.aux)

        theta = backend.detach(z.params)
        condition, validation = evaluate(theta)
        if condition.residual is None:
            raise ArgumentError("error_bound needs ‖∇C̃1‖: give Derivatives(inner_grad=…)")
        solution, _ = solve_adjoint(backend, problem, condition, validation, estimator.solver, state.memory)
        x = solution.x

        def norm(tree: Tree) -> Scalar:
            return vectors.norm(backend, backend.detach(tree))

        def parts(condition: Condition, validation: Validation) -> tuple[Tree, Tree, Tree, Tree]:
            """Return D, r, (∂_θ G)ᵀ x and (∂_λ G)ᵀ x."""
            hx, mixed, _ = condition.both(x)
            term = vectors.subtract(backend, validation.direct, mixed)
            return term, vectors.subtract(backend, validation.v, hx), hx, mixed

        flat, unravel = backend.ravel(theta)
        probes = [
            norm(condition.both(unravel(backend.random.normal(0, k, tuple(flat.shape), flat))).mixed)
            for k in range(_PROBES)
        ]
        term, r, hx, mixed = parts(condition, validation)
        length = norm(x)
        length = xp.where(length > 0, length, xp.ones_like(length))
        stretch, nan = norm(hx) / length, float("nan") * length
        # The solver met curvatures of A + δI. In these, curvatures of A below δ cannot be told apart.
        shift = solution.shift
        met = solution.smallest - shift + 0 * stretch
        smallest = xp.minimum(met, xp.where(stretch > 0, stretch, float("inf") + stretch))
        smallest = xp.where(smallest > shift, smallest, nan)
        coupling = xp.maximum(xp.sqrt(sum(p * p for p in probes) / _PROBES), norm(mixed) / length)

        # The length of a gradient step, but large enough for the changes to exceed rounding.
        slope = norm(condition.residual)
        smallest_distance = float(xp.finfo(slope.dtype).eps) ** 0.5 * (1.0 + norm(theta))
        largest = xp.where(solution.curvature > stretch, solution.curvature, stretch)
        distance = xp.maximum(slope / largest, smallest_distance)
        divisor = xp.where(slope > 0, slope, xp.ones_like(slope))
        shifted = evaluate(backend.axpy(-distance / divisor, backend.detach(condition.residual), theta))
        changes = [
            norm(vectors.subtract(backend, after, before)) / distance
            for after, before in zip(parts(*shifted)[:2], (term, r), strict=True)
        ]
        gain = coupling / smallest
        return gain * norm(r) + (changes[0] + gain * changes[1]) * slope / smallest
