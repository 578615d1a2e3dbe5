"""The backend protocol in NumPy: trees by optree, derivatives by HIPS autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import autograd.numpy as anp
import numpy as np
from autograd.tracer import getval, isbox

from hypergrad.backend import Array, Kind, Leaf, Scalar, Tree, eager
from hypergrad.errors import no_outer_derivative
from hypergrad_numpy.tracing import depth, pulled_by, pushforward, trace

_KINDS: dict[str, Kind] = {
    "f": "float",
    "i": "int",
    "u": "int",
    "b": "bool",
    "c": "complex",
}


@final
class NumpyBackend:
    """NumPy arrays and scalars, differentiated by HIPS autograd to any order.

    Losses use ``autograd.numpy``. Python numbers count as 0-d arrays of NumPy's default dtype. Eager, so
    values can always be read, except where an outer derivative is being traced.
    """

    name = "numpy"
    compiles = False
    xp = anp

    # Leaves and trees.

    def owns(self, leaf: Any) -> bool:
        return isbox(leaf) or isinstance(leaf, np.ndarray | np.generic | int | float | complex)

    def describe(self, leaf: Array) -> Leaf:
        value = np.asarray(getval(leaf))
        kind: Kind = _KINDS.get(value.dtype.kind, "other")
        return Leaf(kind, str(value.dtype), value.shape, value.dtype.itemsize, "cpu")

    def readable(self, *leaves: Array) -> bool:
        return not any(isbox(leaf) for leaf in leaves)

    def number(self, scalar: Scalar) -> Any:
        return None if isbox(scalar) else np.asarray(scalar)[()]

    flatten = staticmethod(eager.flatten)
    paths = staticmethod(eager.paths)
    map = staticmethod(eager.map)

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        pairs = zip(self.flatten(x)[0], self.flatten(y)[0], strict=True)
        products = [anp.sum(self._wide(a) * self._wide(b)) for a, b in pairs if self._is_float(a)]
        return sum(products[1:], products[0]) if products else np.float64(0.0)

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        def leaf(x: Array, y: Array) -> Array:
            if not self._is_float(y):
                return y
            result = a * x + y
            if not isbox(result):
                return np.asarray(result, self._dtype(y))
            return result if result.dtype == self._dtype(y) else result.astype(self._dtype(y))

        return self.map(leaf, x, y)

    def zeros(self, tree: Tree) -> Tree:
        return self.map(lambda x: np.zeros(np.shape(x), self._dtype(x)), tree)

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        leaves, unflatten = self.flatten(tree)
        shapes = [np.shape(leaf) for leaf in leaves]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])

        def unravel(vector: Array) -> Tree:
            starts = [0, *ends[:-1]]
            return unflatten(
                [anp.reshape(vector[i:j], shape) for i, j, shape in zip(starts, ends, shapes, strict=True)]
            )

        return anp.concatenate([anp.ravel(leaf) for leaf in leaves]), unravel

    # Calculus.

    def value_and_grad(self, f: Callable[[Tree], Scalar], x: Tree) -> tuple[Scalar, Tree]:
        value, pullback = self.vjp(f, x)
        (gradient,) = pullback(np.ones((), self._dtype(value)))
        return value, gradient

    def vjp(self, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
        value, aux, pullback = trace(f, primals, self._is_float, has_aux)
        return (value, pullback, aux) if has_aux else (value, pullback)

    def jvp(self, f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Any:
        return pushforward(f, primals, tangents, self._is_float)

    def linear_solve(
        self, matvec: Any, v: Tree, solve: Any, again: Any, symmetric: bool
    ) -> tuple[Tree, Tree]:
        return eager.LinearSolve(self, depth, pulled_by, again, symmetric)(matvec, v, solve)

    def detach(self, tree: Tree) -> Tree:
        return self.map(getval, tree)

    def opaque(self, tree: Tree, what: str) -> Tree:
        if any(isbox(leaf) for leaf in self.flatten(tree)[0]):
            raise no_outer_derivative(what)
        return tree

    def copy(self, tree: Tree) -> Tree:
        return self.map(lambda x: x if isbox(x) else np.array(x), tree)

    def watched(self) -> AbstractContextManager[None]:
        return nullcontext()

    def adopt(self, tree: Tree) -> Tree:
        return tree

    # Control flow.

    scan = staticmethod(eager.scan)
    while_loop = staticmethod(eager.while_loop)
    repeat = staticmethod(eager.repeat)
    each = staticmethod(eager.each)
    cond = staticmethod(eager.cond)
    stack = staticmethod(eager.stack)
    room = staticmethod(eager.room)
    put = staticmethod(eager.put)
    take = staticmethod(eager.take)
    elementwise = staticmethod(eager.elementwise)
    dense = eager.dense
    collect = eager.collect
    linearize = eager.linearize
    normal = eager.normal
    compile = staticmethod(eager.compile)
    tell = staticmethod(eager.tell)

    # Randomness: the global generator behind ``numpy.random.normal`` and its kin.

    def generator(self, seed: int | None = None) -> Any:
        return np.random.get_state() if seed is None else np.random.RandomState(seed).get_state()

    @contextmanager
    def replay(self, generator: Any) -> Iterator[None]:
        found = self.generator()
        self.restore(generator)
        try:
            yield
        finally:
            self.restore(found)

    def restore(self, generator: Any) -> None:
        np.random.set_state(generator)

    def update_rule(self, optimizer: Any) -> None:
        return None

    # The way in and out.

    def asarray(self, values: Any, like: Array | None = None) -> Array:
        return np.array(values, None if like is None else self._dtype(like))

    def to_host(self, tree: Tree) -> Tree:
        return tree

    from_host = to_host

    def cast(self, array: Array, dtype: str) -> Array:
        with np.errstate(invalid="ignore"):  # what an integer cannot hold has no meaning in any framework
            return np.asarray(array).astype(dtype)

    def to_numpy(self, array: Array) -> Any:
        return np.asarray(getval(array))

    @staticmethod
    def _dtype(x: Array) -> np.dtype[Any]:
        dtype: np.dtype[Any] = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        return dtype

    def _wide(self, x: Array) -> Array:
        """Sums are taken in float32 or better."""
        return x.astype("float32") if self._dtype(x).itemsize < 4 else x

    def _is_float(self, x: Array) -> bool:
        return self._dtype(x).kind == "f"
