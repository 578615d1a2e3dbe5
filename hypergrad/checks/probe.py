"""How should the mixed term be taken on *your* problem? Measured once, chosen by you."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hypergrad.backend import Backend, Tree, find_backend, vectors
from hypergrad.errors import ArgumentError, HypergradError
from hypergrad.estimators import Estimate, HypergradientEstimator
from hypergrad.problems.base import Problem
from hypergrad.problems.batches import Batches
from hypergrad.second_order.differences import FiniteDifference


class Way(NamedTuple):
    """One way to take the mixed term. ``failure`` says why it is none; its numbers are then NaN.

    ``seconds`` is the median time of one estimate. ``error`` is the distance ‖g − g_exact‖/‖g_exact‖ to the
    exact hypergradient if that exists, and otherwise the difference's own estimate of it.
    """

    mixed: FiniteDifference | None
    seconds: float
    error: float
    failure: str = ""


@dataclass(frozen=True)
class Probe:
    """What `probe` measured; printing it gives a table."""

    estimator: str
    ways: tuple[Way, ...]

    @property
    def best(self) -> FiniteDifference | None:
        """The fastest way that worked: what to pass as ``mixed=``.

        Raises:
            ArgumentError: if none worked.
        """
        working = [way for way in self.ways if not way.failure]
        if not working:
            raise ArgumentError("no way to take the mixed term works on this problem")
        return min(working, key=lambda way: way.seconds).mixed

    def __str__(self) -> str:
        rows = [f"{self.estimator}: ways to take the mixed term"]
        for way in self.ways:
            name = "exact" if way.mixed is None else repr(way.mixed)
            seen = way.failure.splitlines()[0] if way.failure else (
                f"{1e3 * way.seconds:9.2f} ms   error {way.error:.1e}"
            )  # fmt: skip
            rows.append(f"  {name:64} {seen}")
        return "\n".join(rows)


def probe(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    train: Batches,
    val: Batches,
    estimator: HypergradientEstimator,
    *,
    ways: tuple[FiniteDifference | None, ...] = (None, FiniteDifference(), FiniteDifference(sides=1)),
    repeats: int = 5,
    aux: Tree = (),
    backend: Backend | str | None = None,
) -> Probe:
    """Time the exact mixed term and finite differences of it, interleaved, and compare what they return.

    Nothing is chosen here: pass ``mixed=probe(...).best`` to the estimator, or what the table suggests to
    you. The times are those of whole estimates, after one that does not count.

    Args:
        problem, params, hparams, train, val, estimator: as for `hypergradient`. The estimator is a `Greedy`
            or an `Implicit`; ``train`` is no iterator.
        ways: what to try, ``None`` being the exact term.
        repeats: estimates of each.
        aux: the auxiliary state of losses that have one.
        backend: found from the arrays if it is not given.

    Raises:
        ArgumentError: if the estimator has no mixed term to choose.
    """
    if not hasattr(estimator, "mixed"):
        raise ArgumentError(f"probe: {type(estimator).__name__} has no mixed= to choose")
    found = find_backend(params, hparams, backend=backend)
    draws = found.random.state()

    def estimate(mixed: FiniteDifference | None) -> Estimate:
        chosen: Any = replace(estimator, mixed=mixed)  # type: ignore[call-arg]
        with found.random.replay(draws):
            state = chosen.init(problem, params, hparams, aux=aux, backend=found)
            out: Estimate = chosen.estimate(problem, state, hparams, train, val, backend=found)
        return out

    first: list[Estimate | str] = []
    for mixed in ways:
        try:
            first.append(estimate(mixed))
        except HypergradError as error:
            first.append(str(error))
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for k, mixed in enumerate(ways):
            if not isinstance(first[k], str):
                begin = time.perf_counter()
                # Reading a number waits for the device, if there is one.
                found.to_numpy(estimate(mixed).outer_value)
                times[k].append(time.perf_counter() - begin)
    exact = next((out for mixed, out in zip(ways, first, strict=True) if mixed is None), "")

    def way(k: int) -> Way:
        out = first[k]
        if isinstance(out, str):
            return Way(ways[k], float("nan"), float("nan"), out)
        seconds = sorted(times[k])[len(times[k]) // 2]
        if isinstance(exact, str):
            return Way(ways[k], seconds, float(found.to_numpy(out.report.difference_error)))
        gap = vectors.norm(found, vectors.subtract(found, out.hypergradient, exact.hypergradient))
        size = vectors.norm(found, exact.hypergradient)
        return Way(ways[k], seconds, float(found.to_numpy(gap)) / (float(found.to_numpy(size)) or 1.0))

    return Probe(repr(estimator), tuple(way(k) for k in range(len(ways))))
