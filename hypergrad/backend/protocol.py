"""What an array framework must say: six methods. Everything else follows from them.

A backend is a stateless object. It wraps no arrays, holds no settings, and there is no current one: every
estimate finds it from the leaves that it is given, or takes it as ``backend=``. `hypergrad.testing` holds the
laws that each backend must obey, and ``docs/backends.md`` writes one from scratch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
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
"""The functions of `Backend.xp` that this library uses; a law checks that they are there."""


P = ParamSpec("P")
R = TypeVar("R")


class _Of(property, Generic[P, R]):
    """A method of one of the backend's nouns, as a method of the backend, without a call in between."""

    if TYPE_CHECKING:

        def __get__(self, instance: Any, owner: Any = None) -> Callable[P, R]: ...  # type: ignore[override]


def of(noun: str, method: Callable[Concatenate[Any, P], R]) -> _Of[P, R]:
    """Forward a method of a noun: ``backend.scan`` is ``backend.loops.scan``."""
    return _Of(attrgetter(f"{noun}.{method.__name__}"), doc=method.__doc__)


class Backend(ABC):
    """Calculus, vector space and control flow of one array framework.

    To write one, implement `owns`, `readable`, `asarray`, `to_numpy`, `detach` and `vjp`, and set ``name``
    and ``xp``. Four nouns, `trees`, `loops`, `random` and `memory`, are objects with defaults in plain
    Python; override the property of that name to replace one. Every other method is derived from these.
    Override it where the framework has a faster way.

    Functions given to the calculus take and return trees. Leaves that are not floating point pass through
    unchanged and get zero cotangents. Derivatives nest: a `vjp` of a `vjp` is a second derivative.
    """

    name: ClassVar[str]
    """The name of the framework's module, which is also the key of the entry point."""

    xp: ClassVar[Any]
    """The functions of `NAMESPACE` under their array-API names, with derivatives where these exist.

    ``where`` takes Python numbers. Arrays have arithmetic, ``@``, ``.T``, indices and slices, comparisons,
    ``& | ~``, ``.shape``, ``.dtype``, ``float()``, ``int()`` and ``bool()``; integers also ``// % << >>``."""

    compiles: ClassVar[bool] = False
    """Does `compile` make programs? If not, everything runs as it is written."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # What a framework must say.

    @abstractmethod
    def owns(self, leaf: Any) -> bool:
        """Is this object an array of the framework? Arrays that are being traced are."""

    @abstractmethod
    def readable(self, *leaves: Array) -> bool:
        """Can all values be read now?

        Not if a derivative is being taken through an array, if a compiler traces it, or if it lies on a
        device that one would have to wait for. Objects that are no arrays are readable.
        """

    @abstractmethod
    def asarray(self, values: Any, like: Array | None = None) -> Array:
        """An array from NumPy values, in their dtype, or in the dtype and on the device of ``like``."""

    @abstractmethod
    def to_numpy(self, array: Array) -> Any:
        """The values of an array, traced by a derivative or not, as a NumPy array.

        Waits for a device if it must. Python numbers are taken, too.
        """

    @abstractmethod
    def detach(self, tree: Tree) -> Tree:
        """A tree of the same values, through which no derivative passes, not even an outer one."""

    @abstractmethod
    def vjp(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Pullback, Tree]:
        """Evaluate ``value, aux = f(*primals)`` and return ``(value, pullback, aux)``.

        The pullback is that of the value. value and aux stay attached to outer derivatives, and are constants
        for the derivative that is taken here.
        """

    # Four nouns.

    @cached_property
    def trees(self) -> Trees:
        """How trees are taken apart and put together; by default as optree does it."""
        return Trees()

    @cached_property
    def loops(self) -> Loops:
        """Loops, branches, compilation, and the rows that loops keep; by default in plain Python."""
        return Loops(self)

    @cached_property
    def random(self) -> Random:
        """The framework's own generator; by default there is none."""
        return Random(self)

    @cached_property
    def memory(self) -> Memory:
        """Copies to the host's memory and back; by default arrays already lie there."""
        return Memory(self)

    flatten = of("trees", Trees.flatten)
    paths = of("trees", Trees.paths)
    map = of("trees", Trees.map)
    scan = of("loops", Loops.scan)
    while_loop = of("loops", Loops.while_loop)
    repeat = of("loops", Loops.repeat)
    cond = of("loops", Loops.cond)
    each = of("loops", Loops.each)
    compile = of("loops", Loops.compile)
    callback = of("loops", Loops.callback)
    stack = of("loops", Loops.stack)
    take = of("loops", Loops.take)
    empty_rows = of("loops", Loops.empty_rows)
    set_row = of("loops", Loops.set_row)
    dense = of("loops", Loops.dense)
    collect = of("loops", Loops.collect)

    # Leaves.

    def describe(self, leaf: Array) -> Leaf:
        """Kind, dtype, shape, bytes of an element and device, without reading values.

        Raises:
            NotImplementedError: for a dtype that NumPy does not know, which only the framework can describe.
        """
        x = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        try:
            kind, name, itemsize = _about(x.dtype if isinstance(x.dtype, np.dtype) else str(x.dtype))
        except TypeError:
            raise self._unknown("describe", f"dtype {x.dtype}") from None
        return Leaf(kind, name, tuple(x.shape), itemsize, "cpu")

    def form(self, tree: Tree) -> Hashable:
        """The structure of a tree with shape, dtype and device of each leaf, as a value that can be hashed.

        Checks of arguments depend on nothing else, so they are made once for each form.
        """
        leaves = self.flatten(tree)[0]
        return self.trees.structure(tree), tuple(
            self.describe(x) if self.owns(x) else type(x) for x in leaves
        )

    def is_float(self, leaf: Any) -> bool:
        """Is this a leaf to differentiate by?"""
        return self.describe(leaf).kind == "float"

    def cast(self, array: Array, dtype: str) -> Array:
        """The array in another dtype, given by its NumPy name.

        Raises:
            NotImplementedError: if the arrays have no ``astype``.
        """
        if not hasattr(array, "astype"):
            raise self._unknown("cast", f"how to convert a {type(array).__name__}")
        return array.astype(dtype)

    def number(self, scalar: Scalar) -> Any:
        """A scalar, or a Python number, as a NumPy scalar of the same dtype.

        ``None`` where it cannot be read, or where a derivative passes through it, which would be lost.
        """
        return np.asarray(self.to_numpy(scalar))[()] if self.readable(scalar) else None

    # The vector space of trees.

    def inner(self, x: Tree, y: Tree) -> Scalar:
        """The inner product ⟨x, y⟩ over all floating-point leaves, 0 if there are none.

        A scalar array, accumulated in float32 or a wider type.
        """
        xs = self.flatten(x)[0]
        ys = xs if y is x else self.flatten(y)[0]
        products = []
        for a, b in zip(xs, ys, strict=True):
            about = self.describe(a)
            if about.kind == "float":
                if about.itemsize < 4:
                    a, b = self.cast(a, "float32"), self.cast(b, "float32")
                products.append(self.xp.sum(a * b))
        return sum(products[1:], products[0]) if products else self.asarray(np.asarray(0.0))

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        """Return a x + y, each leaf in the dtype that it has in y."""

        def leaf(x: Array, y: Array) -> Array:
            return self.cast(a * x + y, self.describe(y).dtype) if self.is_float(y) else y

        return self.map(leaf, x, y)

    def zeros(self, tree: Tree) -> Tree:
        """The zero vector of the tree's space."""

        def leaf(x: Array) -> Array:
            about = self.describe(x)
            return self.asarray(np.zeros(about.shape, about.dtype), like=x if self.owns(x) else None)

        return self.map(leaf, tree)

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        """All leaves as one vector, and a function that makes such a tree of a vector.

        That function gives each leaf its shape and dtype, whatever the dtype of the vector.
        """
        leaves, unflatten = self.flatten(tree)
        about = [self.describe(leaf) for leaf in leaves]
        ends = np.cumsum([int(np.prod(leaf.shape)) for leaf in about])

        def unravel(vector: Array) -> Tree:
            dtype, starts = self.describe(vector).dtype, [0, *ends[:-1]]
            parts = [
                self.xp.reshape(vector[i:j], leaf.shape)
                for i, j, leaf in zip(starts, ends, about, strict=True)
            ]
            return unflatten(
                [
                    x if leaf.dtype == dtype else self.cast(x, leaf.dtype)
                    for x, leaf in zip(parts, about, strict=True)
                ]
            )

        arrays = [leaf if self.owns(leaf) else self.asarray(np.asarray(leaf)) for leaf in leaves]
        return self.xp.concatenate([self.xp.reshape(leaf, (-1,)) for leaf in arrays]), unravel

    # Calculus.

    def pullback(self, f: Callable[..., Tree], *primals: Tree) -> tuple[Tree, Pullback]:
        """Like `vjp`, for an f that returns its value without aux: ``(value, pullback)``."""
        value, pullback, _ = self.vjp(lambda *xs: (f(*xs), None), *primals)
        return value, pullback

    def linearize(self, f: Callable[..., tuple[Tree, Tree]], *primals: Tree) -> tuple[Tree, Push, Tree]:
        """Evaluate ``value, aux = f(*primals)`` and return ``(value, push, aux)``, where push is ẋ ↦ ∂f ẋ.

        By default the pullback is pulled back: it is linear in its cotangent, and its transpose is ∂f. That
        costs two gradients, and two more for each tangent.
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

        By default the solver's own steps are differentiated. Where a framework lets one define a derivative,
        `hypergrad.backend.linear.LinearSolve` calls ``solve_derivative``, with A or its transpose, once for
        each derivative by v or by what ``matvec`` depends on. aux has no derivative.

        Args:
            matvec: p ↦ A p.
            v: the right-hand side.
            solve: ``(matvec, v) -> (x, aux)``.
            solve_derivative: the same, for the solves that derivatives take.
            symmetric: is A its own transpose?
        """
        return solve(matvec, v)

    def nondifferentiable(self, tree: Tree, what: str) -> Tree:
        """The same values, through which no derivative can be taken.

        By default a leaf that cannot be read is one that is being differentiated. Override it where leaves
        are unreadable for another reason, such as a compiler or a device.

        Raises:
            UnsupportedOpError: that ``what`` has no derivative, now or when one is taken.
        """
        if not self.readable(*self.flatten(tree)[0]):
            raise no_outer_derivative(what)
        return tree

    def recorded(self) -> AbstractContextManager[None]:
        """Inside this block, operations on the caller's own arrays are recorded, so that the result can be
        differentiated.

        By default nothing is done, for frameworks that differentiate functions.
        """
        return nullcontext()

    def constants(self, tree: Tree) -> Tree:
        """The caller's arrays as constants, unless an outer derivative is being taken.

        By default nothing is done, for frameworks whose arrays record nothing by themselves.
        """
        return tree

    def copy(self, tree: Tree) -> Tree:
        """The same values in new containers, and in new arrays if arrays can be written to."""
        return self.map(lambda x: x, tree)

    def _unknown(self, method: str, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} does not say {what}: override Backend.{method}")


@cache
def _about(dtype: Any) -> tuple[Kind, str, int]:
    """Kind, name and bytes of a dtype of NumPy's, or of one that has such a name."""
    known = np.dtype(dtype)
    return _KINDS.get(known.kind, "other"), str(known), known.itemsize


class _Transposed(Push):
    """ẋ ↦ ∂f ẋ as the transpose of a pullback."""

    def __init__(self, transpose: Pullback, reached: tuple[Tree, ...]) -> None:
        self._transpose, self._reached = transpose, reached

    def __call__(self, *tangents: Tree) -> Tree:
        return self._transpose(tangents)[0]

    @property
    def reached(self) -> tuple[Tree, ...]:
        return self._reached
