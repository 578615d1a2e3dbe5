"""The backend protocol: six methods that an array framework must provide. The rest is derived from them.

A backend is a stateless object that wraps no arrays and holds no settings. There is no current backend: each
estimate infers it from the leaves that it is given, or takes it as ``backend=``. `hypergrad.testing` holds
the laws that every backend must obey, and ``docs/backends.md`` shows how to write one from scratch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from itertools import accumulate
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np

from hypergrad.backend.loops import Loops
from hypergrad.backend.memory import Memory
from hypergrad.backend.random import Random
from hypergrad.backend.trees import Trees
from hypergrad.backend.types import Array, Kind, Leaf, Pullback, Push, Scalar, Tree
from hypergrad.errors import no_outer_derivative

_KINDS: dict[str, Kind] = {"f": "float", "i": "int", "u": "int", "b": "bool", "c": "complex"}

NAMESPACE = """
abs all any concatenate exp expm1 finfo isfinite linalg.eigh linalg.svd log log1p max maximum mean min minimum
ones_like reshape round sqrt stack sum tanh where zeros_like
""".split()
"""The functions of `Backend.xp` that this library uses; a law checks that they exist."""


P = ParamSpec("P")
R = TypeVar("R")


class _Forwarded(property, Generic[P, R]):
    """A method of one of the backend's components, as a method of the backend, without an extra call."""

    if TYPE_CHECKING:

        def __get__(self, instance: Any, owner: Any = None) -> Callable[P, R]: ...  # type: ignore[override]


def _forward(component: str, method: Callable[Concatenate[Any, P], R]) -> _Forwarded[P, R]:
    """Forward a method of a component: ``backend.scan`` is ``backend.loops.scan``."""
    return _Forwarded(attrgetter(f"{component}.{method.__name__}"), doc=method.__doc__)


class Backend(ABC):
    """Calculus, vector-space operations and control flow of one array framework.

    To write one, implement `owns`, `readable`, `asarray`, `to_numpy`, `detach` and `vjp`, and set ``name``
    and ``xp``. Four components, `trees`, `loops`, `random` and `memory`, are objects with defaults in plain
    Python; override the property of that name to replace one. All other methods are derived from these;
    override one if the framework has a faster way.

    Functions to be differentiated take and return trees. Leaves that are not floating point pass through
    unchanged and get zero cotangents. Derivatives nest: a `vjp` of a `vjp` is a second derivative.
    """

    name: ClassVar[str]
    """The name of the framework's module, which is also the key of the entry point."""

    xp: ClassVar[Any]
    """The functions of `NAMESPACE` under their array-API names, with derivatives where these exist.

    ``where`` takes Python numbers. Arrays have arithmetic, ``@``, ``.T``, indices and slices, comparisons,
    ``& | ~``, ``.shape``, ``.dtype``, ``float()``, ``int()`` and ``bool()``; integers also ``// % << >>``."""

    compiles: ClassVar[bool] = False
    """Whether `compile` compiles. If not, everything runs in plain Python."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # What a framework must provide.

    @abstractmethod
    def owns(self, leaf: Any) -> bool:
        """Return whether this object is an array of the framework. Arrays being traced are."""

    @abstractmethod
    def readable(self, *leaves: Array) -> bool:
        """Return whether all values can be read now.

        They cannot if a derivative is being taken through an array, if a compiler traces it, or if it is on
        a device that one would have to wait for. Objects that are not arrays are readable.
        """

    @abstractmethod
    def asarray(self, values: Any, like: Array | None = None) -> Array:
        """Return an array of NumPy values, in their dtype, or in the dtype and on the device of ``like``."""

    @abstractmethod
    def to_numpy(self, array: Array) -> Any:
        """Return the values of an array as a NumPy array, even if a derivative is being taken through it.

        Wait for a device if necessary. Python numbers are accepted, too.
        """

    @abstractmethod
    def detach(self, tree: Tree) -> Tree:
        """Return the same values as constants: no derivative passes through them, not even an outer one."""

    @abstractmethod
    def vjp(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Pullback, Tree]:
        """Evaluate ``value, aux = f(*primals)`` and return ``(value, pullback, aux)``.

        The pullback is that of the value alone. value and aux stay attached to outer derivatives, and are
        constants for the derivative that is taken here.
        """

    # Four components.

    @cached_property
    def trees(self) -> Trees:
        """How trees are flattened and rebuilt; by default as optree does it."""
        return Trees()

    @cached_property
    def loops(self) -> Loops:
        """Loops, branches, compilation, and the rows that loops produce; by default in plain Python."""
        return Loops(self)

    @cached_property
    def random(self) -> Random:
        """The framework's own random generator; by default there is none."""
        return Random(self)

    @cached_property
    def memory(self) -> Memory:
        """Copies to the host's memory and back; by default arrays are there already."""
        return Memory(self)

    flatten = _forward("trees", Trees.flatten)
    paths = _forward("trees", Trees.paths)
    map = _forward("trees", Trees.map)
    scan = _forward("loops", Loops.scan)
    while_loop = _forward("loops", Loops.while_loop)
    repeat = _forward("loops", Loops.repeat)
    cond = _forward("loops", Loops.cond)
    each = _forward("loops", Loops.each)
    compile = _forward("loops", Loops.compile)
    callback = _forward("loops", Loops.callback)
    stack = _forward("loops", Loops.stack)
    take = _forward("loops", Loops.take)
    empty_rows = _forward("loops", Loops.empty_rows)
    set_row = _forward("loops", Loops.set_row)
    dense = _forward("loops", Loops.dense)
    collect = _forward("loops", Loops.collect)

    # Leaves.

    def describe(self, leaf: Array) -> Leaf:
        """Return kind, dtype, shape, bytes of an element and device, without reading values.

        Raises:
            NotImplementedError: for a dtype that NumPy does not know, which only the framework can describe.
        """
        x = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        try:
            kind, name, itemsize = _dtype_info(x.dtype if isinstance(x.dtype, np.dtype) else str(x.dtype))
        except TypeError:
            raise self._unknown("describe", f"dtype {x.dtype}") from None
        return Leaf(kind, name, tuple(x.shape), itemsize, "cpu")

    def form(self, tree: Tree) -> Hashable:
        """Return the structure of a tree with shape, dtype and device of each leaf, as a hashable value.

        Checks of arguments depend on nothing else, so they are made once for each form.
        """
        leaves = self.flatten(tree)[0]
        return self.trees.structure(tree), tuple(
            self.describe(x) if self.owns(x) else type(x) for x in leaves
        )

    def is_float(self, leaf: Any) -> bool:
        """Return whether a leaf is floating point, so that derivatives can be taken with respect to it."""
        return self.describe(leaf).kind == "float"

    def cast(self, array: Array, dtype: str) -> Array:
        """Return the array in another dtype, given by its NumPy name.

        Raises:
            NotImplementedError: if the arrays have no ``astype``.
        """
        if not hasattr(array, "astype"):
            raise self._unknown("cast", f"how to convert a {type(array).__name__}")
        return array.astype(dtype)

    def number(self, scalar: Scalar) -> Any:
        """Return a scalar, or a Python number, as a NumPy scalar of the same dtype.

        Return ``None`` if it cannot be read, or if a derivative is being taken through it and would be lost.
        """
        return np.asarray(self.to_numpy(scalar))[()] if self.readable(scalar) else None

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        """Return the inner product ⟨x, y⟩ over all floating-point leaves, or 0 if there are none.

        The result is a scalar array, accumulated in float32 or a wider type. If leaves have several dtypes it
        is in the narrowest of these, which says how accurate it is.
        """
        xs = self.flatten(x)[0]
        ys = xs if y is x else self.flatten(y)[0]
        products = []
        for a, b in zip(xs, ys, strict=True):
            info = self.describe(a)
            if info.kind == "float":
                if info.itemsize < 4:
                    a, b = self.cast(a, "float32"), self.cast(b, "float32")
                products.append(self.xp.sum(a * b))
        if not products:
            return self.asarray(np.asarray(0.0))
        narrowest = min((self.describe(product) for product in products), key=lambda info: info.itemsize)
        return self.cast(sum(products[1:], products[0]), narrowest.dtype)

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        """Return a x + y, each leaf in the dtype that it has in y."""

        def leaf(x: Array, y: Array) -> Array:
            return self.cast(a * x + y, self.describe(y).dtype) if self.is_float(y) else y

        return self.map(leaf, x, y)

    def zeros(self, tree: Tree) -> Tree:
        """Return the zero vector of the tree's space."""

        def leaf(x: Array) -> Array:
            info = self.describe(x)
            return self.asarray(np.zeros(info.shape, info.dtype), like=x if self.owns(x) else None)

        return self.map(leaf, tree)

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        """Return all leaves as one vector, and a function that turns a vector into such a tree.

        That function gives each leaf its shape and dtype, whatever the dtype of the vector.
        """
        leaves, unflatten = self.flatten(tree)
        infos = [self.describe(leaf) for leaf in leaves]
        ends = list(accumulate((prod(info.shape) for info in infos), initial=0))

        def unravel(vector: Array) -> Tree:
            dtype, parts = self.describe(vector).dtype, []
            for start, end, info in zip(ends, ends[1:], infos, strict=False):
                part = self.xp.reshape(vector[start:end], info.shape)
                parts.append(part if info.dtype == dtype else self.cast(part, info.dtype))
            return unflatten(parts)

        arrays = [leaf if self.owns(leaf) else self.asarray(np.asarray(leaf)) for leaf in leaves]
        return self.xp.concatenate([self.xp.reshape(leaf, (-1,)) for leaf in arrays]), unravel

    # Calculus.

    def pullback(self, f: Callable[..., Tree], *primals: Tree) -> tuple[Tree, Pullback]:
        """Return ``(value, pullback)`` as `vjp` does, for an f that returns its value without aux."""
        value, pullback, _ = self.vjp(lambda *xs: (f(*xs), None), *primals)
        return value, pullback

    def uses(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, ...]:
        """Return for each primal a tree of booleans: is the value of f computed from the leaf?

        Unlike in `Pullback.reached`, what passes only through operations without a slope counts, such as a
        rounding, as far as the framework shows; what was detached does not. By default it is `reached`.
        """
        return self.vjp(f, *primals)[1].reached

    def linearize(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Push, Tree]:
        """Evaluate ``value, aux = f(*primals)`` and return ``(value, push, aux)``, where push is ẋ ↦ ∂f ẋ.

        By default push is the transpose of the pullback, which is linear in its cotangent. That costs two
        gradients, and two more for each tangent.
        """
        value, pullback, aux = self.vjp(f, *primals)
        _, transpose = self.pullback(pullback, self.zeros(value))
        return value, _Transposed(transpose, pullback.reached), aux

    def linear_solve(
        self,
        matvec: Callable[[Tree], Tree],
        v: Tree,
        solve: Callable[[Callable[[Tree], Tree], Tree], tuple[Tree, Tree]],
        solve_derivative: Callable[[Callable[[Tree], Tree], Tree], tuple[Tree, Tree]],
        symmetric: bool,
    ) -> tuple[Tree, Tree]:
        """Return ``solve(matvec, v)``, a pair of x = A⁻¹v and aux, with the derivatives of A⁻¹v.

        By default the solver's own iterations are differentiated. For frameworks that let one define a
        derivative, `hypergrad.backend.linear.LinearSolve` calls ``solve_derivative``, with A or its
        transpose, once for each derivative with respect to v or to what ``matvec`` depends on. aux has no
        derivative.

        Args:
            matvec: p ↦ A p.
            v: the right-hand side.
            solve: ``(matvec, v) -> (x, aux)``.
            solve_derivative: like ``solve``, for the solves in derivatives.
            symmetric: whether A is its own transpose.
        """
        return solve(matvec, v)

    def nondifferentiable(self, tree: Tree, what: str) -> Tree:
        """Return the same values; a derivative through them raises an error.

        By default a leaf that cannot be read counts as one that is being differentiated. Override this if
        leaves can be unreadable for another reason, such as a compiler or a device.

        Raises:
            UnsupportedOpError: saying that ``what`` has no derivative, now or when one is taken.
        """
        if not self.readable(*self.flatten(tree)[0]):
            raise no_outer_derivative(what)
        return tree

    def recorded(self) -> AbstractContextManager[None]:
        """Record a block's operations on the caller's own arrays, so that the result can be differentiated.

        By default do nothing, for frameworks that differentiate functions.
        """
        return nullcontext()

    def estimating(self) -> AbstractContextManager[None]:
        """Return a context for an estimate, in which no mode of the caller's changes the arithmetic.

        By default nothing does. Such a mode, as torch's autocast, holds again inside of `as_called`.
        """
        return nullcontext()

    def as_called(self) -> AbstractContextManager[None]:
        """Return a context for a function of the user's within `estimating`: the caller's modes hold."""
        return nullcontext()

    def is_fixed(self, leaf: Any) -> bool:
        """Has the caller marked this leaf as one that training leaves as it is? By default no leaf is.

        `is_float` is false for such a leaf, and `detach` returns it marked as it was.
        """
        return False

    def constants(self, tree: Tree) -> Tree:
        """Return the caller's arrays as constants, unless an outer derivative is being taken.

        By default return them unchanged, for frameworks whose arrays record nothing by themselves.
        """
        return tree

    def copy(self, tree: Tree) -> Tree:
        """Return the same values in new containers, and in new arrays if arrays can be written to."""
        return self.map(lambda x: x, tree)

    def _unknown(self, method: str, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} does not know {what}: override Backend.{method}")


@cache
def _dtype_info(dtype: Any) -> tuple[Kind, str, int]:
    """Return kind, name and bytes of a NumPy dtype, or of the dtype with such a name."""
    numpy_dtype = np.dtype(dtype)
    return _KINDS.get(numpy_dtype.kind, "other"), str(numpy_dtype), numpy_dtype.itemsize


class _Transposed(Push):
    """ẋ ↦ ∂f ẋ as the transpose of a pullback."""

    def __init__(self, transpose: Pullback, reached: tuple[Tree, ...]) -> None:
        self._transpose, self._reached = transpose, reached

    def __call__(self, *tangents: Tree) -> Tree:
        return self._transpose(tangents)[0]

    @property
    def reached(self) -> tuple[Tree, ...]:
        return self._reached
