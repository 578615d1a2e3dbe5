"""The entries of hypergrad, the same in every framework."""

from typing import Any

import hypergrad as hg
from benchmarks.peers.frameworks import MOST, RTOL, Entry, Task
from benchmarks.peers.workloads import MOMENTUM, RATE, Workload


def estimators(workload: Workload) -> list[tuple[str, Any]]:
    """By setting. Others are compared with the first that is right."""
    if not workload.implicit:
        if workload.steps == 1:
            return [("Greedy", hg.Greedy(hg.SGD(RATE)))]
        rule = hg.SGD(RATE, momentum=MOMENTUM)
        return [
            ("Unrolled, default", hg.Unrolled(rule, workload.steps)),
            ("Unrolled, States", hg.Unrolled(rule, workload.steps, tape=hg.States())),
            ("Unrolled, Binomial(4)", hg.Unrolled(rule, workload.steps, tape=hg.Binomial(4))),
        ]
    found = [("CG, default", hg.Implicit()), ("CG(5000)", hg.Implicit(hg.CG(MOST, rtol=RTOL)))]
    kappa = workload.about.get("kappa", 1.0)
    if kappa > 100:
        rank = len(workload.params) // 4
        nystrom = hg.CG(MOST, rtol=RTOL, preconditioner=hg.Nystrom(rank, damping=0.2 / kappa))
        found.append((f"CG, Nystrom({rank})", hg.Implicit(nystrom)))
    found.append(("Direct", hg.Implicit(hg.Direct())))
    if workload.key == "saddle":
        found.append(("MINRES", hg.Implicit(hg.MINRES(MOST, rtol=RTOL))))
    return found


def entries(task: Task, compiled: bool = False) -> list[Entry]:
    """What a compiled program says of its estimate is looked at outside of it; otherwise it raises itself."""
    problem = hg.Bilevel(task.inner, task.outer)

    def entry(setting: str, estimator: Any) -> Entry:
        def estimate(params, hparams, train, val):
            state = estimator.init(problem, params, hparams)
            return estimator.estimate(problem, state, hparams, lambda t: train, val)

        def finish(out):
            return (estimator.check(out) if compiled else out).hypergradient

        return Entry("hypergrad", setting, estimate, finish)

    return [entry(*each) for each in estimators(task.workload)]
