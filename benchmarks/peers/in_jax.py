"""The workloads in JAX, each a program of ``jax.jit``; hypergrad's entries and those written by hand."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from frameworks import MOST, RTOL, Entry, Program, Task
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from ours import estimators
from workloads import LAYERS, RATE, Workload, mlp

import hypergrad as hg

jax.config.update("jax_enable_x64", True)

NAME = "jax"


def versions() -> dict[str, str]:
    return {"jax": jax.__version__}


def wait(result: Any) -> None:
    jax.block_until_ready(result)


def task(workload: Workload) -> Task:
    params = jax.tree.map(jnp.asarray, workload.params)
    train, val = (tuple(map(jnp.asarray, batch)) for batch in (workload.train, workload.val))
    return Task(workload, *losses(workload), params, jnp.asarray(workload.hparams), train, val)


def losses(workload: Workload, dot: Callable[..., Any] = jnp.dot) -> tuple[Any, Any]:
    if workload.loss == "mlp":

        def outer(params, log_l2, batch):
            out = jax.nn.log_softmax(mlp(jnp, params, batch[0]))
            return -jnp.mean(jnp.take_along_axis(out, batch[1][:, None], 1))

        def inner(params, log_l2, batch):
            strengths = jnp.exp(log_l2)
            return outer(params, log_l2, batch) + sum(
                strengths[k] * jnp.sum(params[f"w{k}"] ** 2) for k in range(LAYERS)
            )

        return inner, outer

    signs = 1.0 if workload.penalised is None else jnp.asarray(workload.penalised)

    def data(theta, batch, dot):
        z = dot(batch[0], theta)
        if workload.loss == "squares":
            return 0.5 * jnp.sum((z - batch[1]) ** 2)
        return jnp.sum(jax.nn.softplus(-batch[1] * z))

    def penalised(theta, log_l2, batch):
        return data(theta, batch, dot) + 0.5 * jnp.sum(signs * jnp.exp(log_l2) * theta**2)

    return penalised, lambda theta, log_l2, batch: data(theta, batch, jnp.dot) / len(batch[1])


@cache
def _compiled(task: "Hashed", entry: Entry) -> Any:
    return jax.jit(entry.function).lower(*task.task.arguments).compile()


class Hashed:
    """A task by identity, for the cache of compiled programs."""

    def __init__(self, task: Task):
        self.task = task

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and self.task is other.task

    def __hash__(self) -> int:
        return id(self.task)


def program(task: Task, entry: Entry) -> Program:
    compiled = _compiled(Hashed(task), entry)
    return lambda: entry.finish(compiled(*task.arguments))


def memory(task: Task, entry: Entry) -> float:
    """Temporary memory as XLA plans it, in bytes."""
    return float(_compiled(Hashed(task), entry).memory_analysis().temp_size_in_bytes)


# A product with the data matrix that counts how often a compiled program really makes it.

_passes = [0]
_dot = Primitive("counted_dot")


def _count(columns: int) -> numpy.ndarray:
    _passes[0] += columns
    return numpy.zeros(())


def _run(x: Any, p: Any, *, transposed: bool) -> Any:
    # The p in the callback's arguments keeps it inside the loop that the product is in.
    nothing = jax.pure_callback(
        lambda _: _count(1 if p.ndim == 1 else p.shape[1]), jax.ShapeDtypeStruct((), p.dtype), p.ravel()[0]
    )
    return (x.T if transposed else x) @ p + nothing


@_dot.def_abstract_eval
def _shape(x: Any, p: Any, *, transposed: bool) -> Any:
    return jax.core.ShapedArray((x.shape[1 if transposed else 0], *p.shape[1:]), p.dtype)


def _tangent(primals: Any, tangents: Any, *, transposed: bool) -> Any:
    (x, p), (dx, dp) = primals, tangents
    out, change = _dot.bind(x, p, transposed=transposed), 0.0
    if not isinstance(dp, ad.Zero):
        change += _dot.bind(x, dp, transposed=transposed)
    if not isinstance(dx, ad.Zero):  # some libraries differentiate by the data, too
        change += (dx.T if transposed else dx) @ p
    return out, change


def _batched(args: Any, dims: Any, *, transposed: bool) -> Any:
    columns = jnp.moveaxis(args[1], dims[1], -1)
    return _dot.bind(args[0], columns, transposed=transposed), 1


_dot.def_impl(lambda *args, **kwargs: jax.jit(_run, static_argnames="transposed")(*args, **kwargs))
mlir.register_lowering(_dot, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[_dot] = _tangent
ad.primitive_transposes[_dot] = lambda ct, x, p, *, transposed: [
    None,
    _dot.bind(x, ct, transposed=not transposed),
]
batching.primitive_batchers[_dot] = _batched


def products(task: Task, entry: Entry) -> float:
    """Passes over the training matrix, two of which are one product with a Hessian; ``entry`` is one of a
    task whose losses are `counting`.
    """
    if not task.workload.implicit:
        return math.nan
    _passes[0] = 0
    jax.block_until_ready(jax.jit(entry.function)(*task.arguments))
    return _passes[0] / 2


def counting(task: Task) -> Task:
    return task.counting(losses(task.workload, lambda x, p: _dot.bind(x, p, transposed=False)))


def value(found: Any) -> numpy.ndarray:
    return numpy.asarray(found)


def ours(task: Task) -> list[Entry]:
    problem = hg.Bilevel(task.inner, task.outer)

    def entry(setting: str, estimator: Any) -> Entry:
        def estimate(params, hparams, train, val):
            state = estimator.init(problem, params, hparams)
            return estimator.estimate(problem, state, hparams, lambda t: train, val)

        return Entry("hypergrad", setting, estimate, lambda out: estimator.check(out).hypergradient)

    return [entry(*each) for each in estimators(task.workload)]


def by_hand(task: Task) -> list[Entry]:
    """The same in JAX alone, as one would write it for this problem: no checks, no reports."""
    inner, outer, workload = task.inner, task.outer, task.workload

    def unrolled(params, hparams, train, val, remat=lambda step: step):
        def final(hparams):
            @remat
            def step(carry, _):
                theta, velocity = carry
                slope = jax.grad(inner)(theta, hparams, train)
                velocity = jax.tree.map(lambda v, g: workload.momentum * v + g, velocity, slope)
                return (jax.tree.map(lambda p, v: p - RATE * v, theta, velocity), velocity), None

            start = params, jax.tree.map(jnp.zeros_like, params)
            return outer(lax.scan(step, start, None, workload.steps)[0][0], hparams, val)

        return jax.grad(final)(hparams)

    def implicit(params, hparams, train, val):
        slope, products = jax.linearize(lambda theta: jax.grad(inner)(theta, hparams, train), params)
        v = jax.grad(outer)(params, hparams, val)
        x, _ = jax.scipy.sparse.linalg.cg(products, v, tol=RTOL, maxiter=MOST)
        _, pull = jax.vjp(lambda lam: jax.grad(inner)(params, lam, train), hparams)
        return -pull(x)[0]

    if workload.implicit:
        return [Entry("by hand", "CG of jax.scipy", implicit)]
    found = [Entry("by hand", "jax.grad through a scan", unrolled)]
    if workload.steps > 1:

        def rematerialised(*arguments):
            return unrolled(*arguments, remat=jax.checkpoint)

        found.append(Entry("by hand", "the same, jax.checkpoint", rematerialised))
    return found
