"""Measure which way to compute the mixed term is fastest on your own problem."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hypergrad.backend import Backend, Tree, find_backend, vectors
from hypergrad.errors import ArgumentError, HypergradError
from hypergrad.estimators import Estimate, Greedy, HypergradientEstimator, Implicit
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches
from hypergrad.second_order import Exact, FiniteDifference, Products


class Way(NamedTuple):
    """One way to compute the mixed term. ``failure`` says why it does not work; its numbers are then NaN.

    ``seconds`` is the median time of one estimate. ``error`` is the distance ‖g − g_exact‖/‖g_exact‖ to the
    exact hypergradient if that exists, and otherwise the error that the finite difference estimates itself.
    """

    products: Products
    seconds: float
    error: float
    failure: str = ""


@dataclass(frozen=True)
class Probe:
    """The measurements of `probe`; printing them gives a table."""

    estimator: str
    ways: tuple[Way, ...]

    @property
    def best(self) -> Products:
        """The fastest way that worked: what to pass as ``products=``.

        Raises:
            ArgumentError: if none worked.
        """
        working = [way for way in self.ways if not way.failure]
        if not working:
            raise ArgumentError("no way to compute the mixed term works on this problem")
        return min(working, key=lambda way: way.seconds).products

    def __str__(self) -> str:
        rows = [f"{self.estimator}: ways to compute the mixed term"]
        for way in self.ways:
            name = repr(way.products)
            result = way.failure.splitlines()[0] if way.failure else (
                f"{1e3 * way.seconds:9.2f} ms   error {way.error:.1e}"
            )  # fmt: skip
            rows.append(f"  {name:64} {result}")
        return "\n".join(rows)


def probe(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    train: Batches,
    val: Batches,
    estimator: HypergradientEstimator,
    *,
    ways: tuple[Products, ...] = (Exact(), FiniteDifference(), FiniteDifference(sides=1)),
    repeats: int = 5,
    aux: Tree = None,
    backend: Backend | str | None = None,
) -> Probe:
    """Time the exact mixed term and finite differences of it, interleaved, and compare what they return.

    The estimator does not change: pass it ``products=probe(...).best``, or your own choice from the table.
    The times are of complete estimates, after a first one of each that is not timed.

    Args:
        problem, params, hparams, train, val, estimator: as for `hypergradient`. The estimator is a `Greedy`
            or an `Implicit`; ``train`` must not be an iterator.
        ways: the products to compare.
        repeats: how many estimates of each are timed.
        aux: the auxiliary state of losses that have one.
        backend: found from the arrays if it is not given.

    Raises:
        ArgumentError: if the estimator has no ``products=``.
    """
    if not isinstance(estimator, Greedy | Implicit):
        raise ArgumentError(f"probe: {type(estimator).__name__} has no products= to choose")
    backend = find_backend(params, hparams, backend=backend)
    with backend.random.turn(problem):
        random_state = backend.random.state()

        def estimate(products: Products) -> Estimate[Any]:
            chosen: Any = replace(estimator, products=products)
            with backend.random.replay(random_state):
                state = chosen.init(problem, params, hparams, aux=aux, backend=backend)
                out: Estimate[Any] = chosen.estimate(problem, state, hparams, train, val, backend=backend)
            return out

        first: list[Estimate[Any] | str] = []
        for products in ways:
            try:
                first.append(estimate(products))
            except HypergradError as error:
                first.append(str(error))
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(repeats):
            for k, products in enumerate(ways):
                if not isinstance(first[k], str):
                    begin = time.perf_counter()
                    # Reading a number waits for the device, if there is one.
                    backend.to_numpy(estimate(products).outer_value)
                    times[k].append(time.perf_counter() - begin)
        exact = next((out for way, out in zip(ways, first, strict=True) if isinstance(way, Exact)), "")

        def way(k: int) -> Way:
            out = first[k]
            if isinstance(out, str):
                return Way(ways[k], float("nan"), float("nan"), out)
            seconds = sorted(times[k])[len(times[k]) // 2]
            if isinstance(exact, str):
                error = out.report.difference_error
                return Way(
                    ways[k], seconds, float("nan") if error is None else float(backend.to_numpy(error))
                )
            gap = vectors.norm(backend, vectors.subtract(backend, out.hypergradient, exact.hypergradient))
            size = vectors.norm(backend, exact.hypergradient)
            return Way(
                ways[k], seconds, float(backend.to_numpy(gap)) / (float(backend.to_numpy(size)) or 1.0)
            )

        return Probe(repr(estimator), tuple(way(k) for k in range(len(ways))))
