"""JAXopt: solvers that are differentiated through their iterations, or implicitly by a linear solve."""

import jax
import jaxopt
import optax
from jax import lax
from jaxopt.implicit_diff import custom_root
from jaxopt.linear_solve import solve_cg, solve_normal_cg

from benchmarks.peers.frameworks import MOST, RTOL, Entry, Task
from benchmarks.peers.workloads import RATE


def entries(task: Task) -> list[Entry]:
    return implicit(task) if task.workload.implicit else unrolled(task)


def unrolled(task: Task) -> list[Entry]:
    steps = task.workload.steps
    solver = jaxopt.OptaxSolver(
        fun=task.inner,
        opt=optax.sgd(RATE, momentum=task.workload.momentum or None),
        maxiter=steps,
        tol=0.0,
        implicit_diff=False,
    )

    def run(params, hparams, train, val):
        def final(lam):
            return task.outer(solver.run(params, lam, train).params, lam, val)

        return jax.grad(final)(hparams)

    def scanned(params, hparams, train, val):
        def final(lam):
            def step(carry, _):
                return solver.update(*carry, lam, train), None

            start = jaxopt.OptStep(params, solver.init_state(params, lam, train))
            return task.outer(lax.scan(step, start, None, steps)[0].params, lam, val)

        return jax.grad(final)(hparams)

    found = [Entry("jaxopt", "OptaxSolver.run", run)]
    return [*found, Entry("jaxopt", "OptaxSolver.update in a scan", scanned)] if steps > 1 else found


def implicit(task: Task) -> list[Entry]:
    def entry(setting, solve) -> Entry:
        def estimate(params, hparams, train, val):
            # The optimum is given, as it is to all; what remains is the derivative.
            at = custom_root(jax.grad(task.inner), solve=solve)(lambda theta, lam, train: theta)
            return jax.grad(lambda lam: task.outer(at(params, lam, train), lam, val))(hparams)

        return Entry("jaxopt", setting, estimate)

    def tight(solver):
        return lambda matvec, b: solver(matvec, b, tol=RTOL, maxiter=MOST)

    return [
        entry("solve_normal_cg, default", None),
        entry("solve_normal_cg, tol=1e-6", tight(solve_normal_cg)),
        entry("solve_cg, tol=1e-6", tight(solve_cg)),
    ]
