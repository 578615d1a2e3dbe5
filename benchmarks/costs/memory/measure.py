"""Measure one run, in a process of its own: memory first, then FLOPs and interleaved times."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.costs.memory.case import Case, Measurement
from benchmarks.costs.memory.meters import Resident, Traced
from benchmarks.costs.memory.nets import NETS, Net
from benchmarks.shared.timing import Program, clock

BLOCK, RUNS = 20, 9
"""Gradients that are timed at once, and the most runs that are timed."""


def measure(case: Case) -> Measurement:
    """In a process of its own."""
    net = NETS[case.backend](case.batch)
    return compiled(case, net) if case.backend == "jax" else eager(case, net)


def eager(case: Case, net: Net) -> Measurement:
    torch = case.backend == "torch"
    peak = Resident() if torch else Traced()
    # The framework's own memory: its threads, and the code of its kernels.
    small = net.parameters(8)
    net.step(small, {name: 0 * p for name, p in small.items()})
    estimate(replace(case, length=2), net, small)()
    nothing = peak()
    params = net.parameters(case.width)
    net.step(params, {name: 0 * p for name, p in params.items()})
    plain = peak()
    run = estimate(case, net, params)
    seconds = clock(run)
    most = peak()
    peak.stop()
    copy = sum(leaf.nbytes for leaf in params.values())
    measured = Measurement(case, copy, most - nothing, most - plain, seconds=seconds)
    measured = timed(measured, lambda: [net.gradient(params) for _ in range(BLOCK)], run)
    if not torch or not case.counted:
        return measured
    from benchmarks.costs.nets.in_torch import flops

    return replace(measured, flops=(flops(run) / flops(lambda: net.gradient(params)) - 1) / case.length)


def compiled(case: Case, net: Net) -> Measurement:
    import jax

    params = net.parameters(case.width)
    velocity = {name: 0 * p for name, p in params.items()}
    state, run = case.estimator.init(net.problem, params, net.hparams), case.estimator.estimate

    def planned(program: Any) -> int:
        sizes = program.memory_analysis()
        given = sizes.argument_size_in_bytes - sizes.alias_size_in_bytes
        return given + sizes.output_size_in_bytes + sizes.temp_size_in_bytes

    step = jax.jit(net.step, donate_argnums=(0, 1) if case.donate else ())
    plain = planned(step.lower(params, velocity).compile())

    @partial(jax.jit, donate_argnums=(0,) if case.donate else ())
    def whole(state, hparams, val):
        return run(net.problem, state, hparams, net.train, val)

    args = state, net.hparams, net.val
    program = whole.lower(*args).compile()
    copy = sum(leaf.nbytes for leaf in params.values())
    measured = Measurement(case, copy, planned(program), planned(program) - plain)
    if measured.in_all > case.limit:
        return measured
    gradient = jax.jit(net.gradient).lower(params).compile()
    block = [params] * BLOCK
    return timed(
        measured,
        lambda: jax.block_until_ready([gradient(params) for params in block][-1]),
        lambda: jax.block_until_ready(program(jax.tree.map(jax.numpy.copy, state), *args[1:])),
    )


def estimate(case: Case, net: Net, params: dict[str, Any]) -> Callable[[], Any]:
    estimator, problem = case.estimator, net.problem
    state = estimator.init(problem, params, net.hparams)
    return lambda: estimator.estimate(problem, state, net.hparams, net.train, net.val)


def timed(measured: Measurement, unit: Program, run: Program) -> Measurement:
    """Gradients and runs in turn."""
    case, units, runs = measured.case, [clock(unit) for _ in range(3)][1:], list[float]()
    while sum(runs) < case.seconds and len(runs) < RUNS:
        runs.append(clock(run))
        units.append(clock(unit))
    if not runs:
        return measured
    whole, g = statistics.median(runs), statistics.median(units) / BLOCK
    return replace(measured, time=(whole / g - 1) / case.length, seconds=whole)
