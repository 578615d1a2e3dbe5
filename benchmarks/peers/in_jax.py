"""The workloads in JAX, each a program of ``jax.jit``; hypergrad's entries and those written by hand."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from benchmarks.peers.frameworks import MOST, RTOL, Entry, Task
from benchmarks.peers.losses import Words
from benchmarks.peers.workloads import RATE
from benchmarks.shared.timing import Program

jax.config.update("jax_enable_x64", True)

NAME = "jax"


def versions() -> dict[str, str]:
    return {"jax": jax.__version__}


def wait(result: Any) -> None:
    jax.block_until_ready(result)


def cross_entropy(logits: Any, labels: Any) -> Any:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


WORDS = Words(jnp, jnp.asarray, cross_entropy, jax.nn.softplus, jnp.dot)


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
    return task.counting(WORDS, lambda x, p: _dot.bind(x, p, transposed=False))


def value(found: Any) -> numpy.ndarray:
    return numpy.asarray(found)


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
