"""What an array framework must offer, and how the one in use is found.

A backend is a stateless object with the methods of `Backend`. It wraps no arrays, holds no settings,
and there is no current one: every estimate finds it from the leaves that it is given, or takes it as
``backend=``. Backends come in through the entry-point group ``hypergrad.backends``, whose key is the
name of the framework's module; `hypergrad.testing` holds the laws that each must obey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    pass

Array = Any
Tree = Any
Scalar = Any
Kind = Literal["float", "int", "bool", "complex", "other"]


class Leaf(NamedTuple):
    """What a backend knows about one leaf without reading its values."""

    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    device: str

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf's data."""
        size = self.itemsize
        for n in self.shape:
            size *= n
        return size


class Pullback(Protocol):
    """The transposed derivative of a function at one linearisation, to be called as often as needed."""

    def __call__(self, cotangent: Tree) -> tuple[Tree, ...]:
        """Return uᵀ ∂f/∂primal for each primal; zeros where f does not depend on a leaf."""

    def onto(self, k: int) -> Callable[[Tree], Tree]:
        """The part for the k-th primal alone, which may be cheaper."""

    def last(self, cotangent: Tree) -> tuple[Tree, ...]:
        """The same as a call, after which there will be none: what was kept may go as it is used."""

    @property
    def reached(self) -> tuple[Tree, ...]:
        """For each primal a tree of booleans: does f depend on this leaf? Read off the graph."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the linearisation keeps alive."""


@runtime_checkable
class Backend(Protocol):
    """Calculus, vector space and control flow of one array framework.

    Functions given to the calculus take and return trees. Leaves that are not floating point are
    carried along and get zero cotangents. All of it nests: a `vjp` of a `vjp` is a second derivative.
    """

    name: str
    """The name of the framework's module, which is also the key of the entry point."""

    compiles: bool
    """Does `compile` make programs, or does everything run as it is written?"""

    xp: Any
    """Functions under their array-API names, differentiable where that makes sense:

    ``abs all any exp expm1 finfo isfinite log log1p max maximum mean min minimum ones_like reshape round
    sqrt sum tanh where zeros_like`` and ``linalg.eigh``, ``linalg.svd``. ``where`` takes Python numbers;
    arrays know ``@``, ``.T``, ``[k]``, ``& | ~``, comparisons, ``.dtype``, ``float()`` and ``bool()``, and
    those of integers ``// % << >>``."""

    # Leaves and trees.
    def owns(self, leaf: Any) -> bool:
        """Is this an array of the framework, traced ones included?"""

    def describe(self, leaf: Array) -> Leaf:
        """Kind, dtype, shape and device, for checks and messages."""

    def readable(self, *leaves: Array) -> bool:
        """Can the values be read now: neither traced nor on a device that one would have to wait for?"""

    def number(self, scalar: Scalar) -> Any:
        """The value of a scalar, or of a Python number, as one of NumPy's of the same precision.

        ``None`` where it cannot be read now, and where a derivative goes through it, which would end there.
        """

    def flatten(self, tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
        """Take a tree apart, and return what puts leaves back together. ``None`` is no leaf."""

    def paths(self, tree: Tree, root: str) -> list[str]:
        """Name every leaf as one would write it in Python, starting from the name of the tree."""

    def map(self, f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
        """Apply f leaf by leaf; each tree in ``rest`` may go deeper than the first."""

    # The vector space of trees.
    def inner(self, x: Tree, y: Tree) -> Scalar:
        """Inner product ⟨x, y⟩ over all floating-point leaves, 0 for trees without any."""

    def axpy(self, a: Scalar, x: Tree, y: Tree) -> Tree:
        """Return a x + y, each leaf in the dtype that it has in y."""

    def zeros(self, tree: Tree) -> Tree:
        """The zero vector of the tree's space."""

    def ravel(self, tree: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        """All leaves as one flat vector, and the way back."""

    # Calculus.
    def value_and_grad(self, f: Callable[[Tree], Scalar], x: Tree) -> tuple[Scalar, Tree]:
        """Value and gradient of a scalar function of one tree."""

    def vjp(self, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
        """Return ``(f(*primals), pullback)``.

        With ``has_aux`` f returns ``(value, aux)`` and a third result is aux, cut off from the graph.
        """

    def jvp(self, f: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Any:
        """Return ``(f(*primals), ∂f · tangents)``."""

    def linearize(self, f: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
        """Return ``(f(*primals), push)``, where ``push(*tangents)`` is ∂f · tangents, as often as needed.

        ``push.reached`` is as a pullback's, and ``has_aux`` as for `vjp`.
        """

    def linear_solve(
        self,
        matvec: Callable[[Tree], Tree],
        v: Tree,
        solve: Callable[[Callable[[Tree], Tree], Tree], tuple[Tree, Tree]],
        again: Callable[[Callable[[Tree], Tree], Tree], tuple[Tree, Tree]],
        symmetric: bool,
    ) -> tuple[Tree, Tree]:
        """Return ``solve(matvec, v)``, a pair of x = A⁻¹v and what was seen, with the derivatives of A⁻¹v.

        The solver itself is not differentiated. Outer derivatives, by v and by whatever ``matvec`` depends
        on, take another solve each, by ``again`` with A or its transpose; what was seen has none.
        """

    def detach(self, tree: Tree) -> Tree:
        """The same values, constant for every derivative, outer ones too."""

    def opaque(self, tree: Tree, what: str) -> Tree:
        """The same values, of which nobody can take an outer derivative.

        Raises:
            UnsupportedOpError: that ``what`` has none, now or when it is asked for.
        """

    def copy(self, tree: Tree) -> Tree:
        """The same values in containers and arrays of their own, where arrays can be written to."""

    def watched(self) -> AbstractContextManager[None]:
        """A block of which the caller will take a derivative, by arrays that he brings in."""

    def adopt(self, tree: Tree) -> Tree:
        """Take in the caller's arrays: outside of any derivative taken here, as constants.

        Only a framework that records whatever its arrays go through has anything to cut.
        """

    # Control flow.
    def scan(
        self,
        body: Callable[[Tree, Any, Any], tuple[Tree, Any]],
        carry: Tree,
        length: int,
        xs: Any = None,
        reverse: bool = False,
    ) -> tuple[Tree, Any]:
        """Run ``carry, y = body(carry, k, x)`` for k = 0 … length−1 and return ``carry, ys``.

        ``ys`` are kept in the framework's own way, in the order of k; all that one may do is hand them
        back as ``xs``, from which x is the one of the same k. In reverse k counts down.
        """

    def while_loop(
        self, going: Callable[[Tree], Any], body: Callable[[Tree], Tree], carry: Tree, limit: int
    ) -> Tree:
        """Run the body while ``going(carry)``, which is false after ``limit`` rounds at the latest."""

    def repeat(
        self, body: Callable[[Tree, Any], tuple[Tree, Tree, Tree, Any]], carry: Tree, limit: int
    ) -> tuple[Tree, Tree, Tree, Any]:
        """Run ``carry, row, last, going = body(carry, k)`` for k = 0 … limit−1, limit ≥ 1, while it is going.

        Return ``carry, rows, last, count``: the rows in the framework's own way, as `scan` keeps them, what
        the last round said, and how many rounds there were.
        """

    def cond(self, pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
        """Return ``yes()`` if it holds, and ``no()`` if not.

        Under a compiler both have one structure: ``no`` may return ``None`` where ``yes`` returns a tree,
        and gets zeros there, NaN for floats.
        """

    def each(self, f: Callable[..., Tree], *items: Any) -> Any:
        """f(x, …) for each of the items that `stack` or `each` made, kept as they are; at once, if it may."""

    def dense(self, rows: Any) -> Tree:
        """What `scan`, `each` or `stack` kept: one tree of the framework's arrays, whose first axis is k."""

    def collect(self, rows: Any) -> Tree:
        """What `scan` or `repeat` kept, or a list of trees: one tree of NumPy arrays, whose first axis is k.

        While a compiler traces, they stay arrays of the framework.
        """

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A function of trees of arrays as one program, if the framework makes such; else the function."""

    def tell(self, listener: Callable[..., None], *values: Any) -> None:
        """Call the listener with the values, when they are there: for progress, never for results."""

    def stack(self, items: Sequence[Tree]) -> Any:
        """Trees of one kind, kept in the framework's own way, for `take`."""

    def room(self, like: Tree, places: int) -> Any:
        """Places for trees of one kind, which mean nothing until `put`."""

    def put(self, items: Any, k: Any, item: Tree) -> Any:
        """The items with this one in the k-th place; those that were given are used up."""

    def take(self, items: Any, k: Any) -> Tree:
        """The k-th of what `stack` or `put` was given; a `scan` may hand out k."""

    def elementwise(
        self, f: Callable[..., tuple[Sequence[Array], Any]], used: Sequence[Array], given: Sequence[Array]
    ) -> tuple[list[Array], Any]:
        """``f(*used, *given)`` of arrays of one shape, with little memory for what f makes on its way.

        f works element by element. It returns new values, in the dtypes of those that are used up and may be
        written over, and a tuple of sums; where it is done in parts, those of all are added.
        """

    # Randomness.
    def generator(self, seed: int | None = None) -> Any:
        """State of the framework's own generator, as it is now or as the seed makes it; else None."""

    def normal(self, seed: int, count: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Standard normal numbers, the same for the same seed and count; no generator is touched."""

    def replay(self, generator: Any) -> AbstractContextManager[None]:
        """A block that draws from the state given, and leaves the generator as it found it."""

    def restore(self, generator: Any) -> None:
        """Put the generator into a state that `generator` returned."""

    # Optimisers.
    def update_rule(self, optimizer: Any) -> Any:
        """The `hypergrad.updates.UpdateRule` of an optimiser of the framework; ``None`` for anything else."""

    # The way in and out.
    def asarray(self, values: Any, like: Array | None = None) -> Array:
        """An array from NumPy values, in the dtype and on the device of ``like``."""

    def to_host(self, tree: Tree) -> Tree:
        """A copy in the host's memory, made while the device goes on; the tree itself if it lies there."""

    def from_host(self, tree: Tree) -> Tree:
        """The way back, for what `to_host` returned."""

    def cast(self, array: Array, dtype: str) -> Array:
        """The array in another dtype of the framework's, by its NumPy name."""

    def to_numpy(self, array: Array) -> Any:
        """The values as a NumPy array; waits for a device if it must."""
