"""The workloads in NumPy, for hypergrad's reference backend. No peer runs here; it is one more witness."""

import math
import tracemalloc
from importlib.metadata import version
from typing import Any

import autograd.numpy as np
import numpy
from frameworks import Entry, Program, Task
from ours import estimators
from workloads import LAYERS, Workload, mlp

import hypergrad as hg

NAME = "numpy"


def versions() -> dict[str, str]:
    return {"autograd": version("autograd")}


def wait(_: Any) -> None:
    """Done when it returns."""


def task(workload: Workload) -> Task:
    arguments = workload.params, workload.hparams, workload.train, workload.val
    return Task(workload, *losses(workload), *arguments)


def losses(workload: Workload) -> tuple[Any, Any]:
    if workload.loss == "mlp":

        def outer(params, log_l2, batch):
            out = mlp(np, params, batch[0])
            out = out - np.max(out, axis=1, keepdims=True)
            chosen = out[np.arange(len(batch[1])), batch[1]]
            return np.mean(np.log(np.sum(np.exp(out), axis=1)) - chosen)

        def inner(params, log_l2, batch):
            strengths = np.exp(log_l2)
            return outer(params, log_l2, batch) + sum(
                strengths[k] * np.sum(params[f"w{k}"] ** 2) for k in range(LAYERS)
            )

        return inner, outer

    signs = 1.0 if workload.penalised is None else workload.penalised

    def data(theta, batch):
        z = np.dot(batch[0], theta)
        if workload.loss == "squares":
            return 0.5 * np.sum((z - batch[1]) ** 2)
        return np.sum(np.logaddexp(0.0, -batch[1] * z))

    def penalised(theta, log_l2, batch):
        return data(theta, batch) + 0.5 * np.sum(signs * np.exp(log_l2) * theta**2)

    return penalised, lambda theta, log_l2, batch: data(theta, batch) / len(batch[1])


def program(task: Task, entry: Entry) -> Program:
    return lambda: entry.finish(entry.function(*task.arguments))


def memory(task: Task, entry: Entry) -> float:
    """The peak of what tracemalloc sees."""
    run = program(task, entry)
    tracemalloc.start()
    try:
        run()
        return float(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def counting(task: Task) -> Task:
    return task


def products(task: Task, entry: Entry) -> float:
    return math.nan


def value(found: Any) -> numpy.ndarray:
    return numpy.asarray(found)


def ours(task: Task) -> list[Entry]:
    problem = hg.Bilevel(task.inner, task.outer)

    def entry(setting: str, estimator: Any) -> Entry:
        def estimate(params, hparams, train, val):
            state = estimator.init(problem, params, hparams)
            return estimator.estimate(problem, state, hparams, lambda t: train, val).hypergradient

        return Entry("hypergrad", setting, estimate)

    return [entry(*each) for each in estimators(task.workload)]


def by_hand(task: Task) -> list[Entry]:
    return []
