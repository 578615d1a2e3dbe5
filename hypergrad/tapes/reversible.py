"""The tape that keeps no states: training runs backwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import or_
from typing import Any, NamedTuple, final

from hypergrad import vectors
from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.tapes.base import Generator, Pulled, Recording, Sweep, Tape, Trajectory
from hypergrad.tapes.fixedpoint import FixedPoint, Ratio, pooled
from hypergrad.training import Inner, Seen, inner_gradient, observe
from hypergrad.updates.base import is_off, resolve
from hypergrad.updates.sgd import SGD, Momentum

DID_NOT_COME_BACK, LOG_IS_FULL = -2, -3
"""Faults beside the number of a leaf that did not fit."""


@final
@dataclass(frozen=True)
class Reversible(Tape):
    r"""Keep the last state alone, and take every step of momentum SGD back exactly (Maclaurin et al. 2015).

        b_{t+1} = μ b_t + (1 − δ) (g_t + w θ_t),    θ_{t+1} = θ_t − η b_{t+1}
        θ_t = θ_{t+1} + η b_{t+1},    b_t = (b_{t+1} − (1 − δ) (g_t + w θ_t)) / μ

    in integers, so that θ_0 and b_0 come back bit for bit: see `hypergrad.tapes.fixedpoint`. The run is that
    of `hypergrad.SGD` to the rounding of fixed point, 2^−F, and so is the hypergradient. Rates, momentum and
    their schedules may be hyperparameters.

    Cost: 4 T gradients. Memory: parameters, velocity and pool, and log2(1/μ) bits for each parameter and
    step, 0.15 for μ = 0.9; the auxiliary state and the generator's are kept for each step, if there are such.
    What comes back is compared with what was given. The momentum is read, if it lies on a device.

    Args:
        fraction: F, the bits after the point; 48 of 64 for float64 and 24 of 32 for narrower parameters, in
            which numbers below 2^15 and 2^7 fit.
        log_bits: bits for each parameter that are set aside for what is remembered. Only a compiled program
            with a momentum that it does not know has to be told; by default one a step, enough for μ ≥ ½.

    Raises:
        ArgumentError: for another update rule than SGD with momentum: without one a step forgets, Adam
            divides by what it forgets, and Nesterov's needs the gradient to find where it was taken.
        UnsupportedOpError: for a derivative of the hypergradient, which integers do not have.
        FixedPointError: when used, if a number does not fit, or does not come back.
    """

    fraction: int | None = None
    log_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("fraction", "log_bits"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"Reversible: {name} = {value!r}; it is a positive integer")

    def numbers(self, backend: Backend, params: Tree) -> FixedPoint:
        """The fixed-point form of these parameters."""
        bits = 64 if backend.describe(backend.flatten(params)[0][0]).itemsize > 4 else 32
        fraction = (48 if bits == 64 else 24) if self.fraction is None else self.fraction
        if fraction > bits - 4:
            raise ArgumentError(f"Reversible: fraction = {fraction}; of {bits} bits {bits - 4} are the most")
        return FixedPoint(backend, bits, fraction)

    def record(self, path: Trajectory, z: Inner, hparams: Tree) -> Recording:
        z, hparams = path.backend.opaque((z, hparams), "hg.Reversible")
        run = _Run(path, hparams, self.numbers(path.backend, z.params), _momentum_sgd(path.training.update))
        return run.record(z, self.log_bits)


def _momentum_sgd(rule: Any) -> SGD:
    """The rule, if its steps can be taken back."""
    instead = "take hg.Binomial or hg.States"
    rule = rule.formula
    if not isinstance(rule, SGD):
        raise ArgumentError(
            f"Reversible takes back steps of hg.SGD with momentum, and {type(rule).__name__} forgets what it "
            f"would need for that: {instead}"
        )
    if is_off(rule.momentum):
        raise ArgumentError(f"Reversible: without momentum a step cannot be taken back exactly: {instead}")
    if rule.nesterov:
        raise ArgumentError(
            "Reversible: a Nesterov step needs the gradient to find the parameters at which it was taken: "
            + instead
        )
    return rule


class Integers(NamedTuple):
    """θ, b and the pool in integers, and the most that the pool may hold."""

    params: Tree
    velocity: Tree
    pool: Tree
    top: Any


class Log(NamedTuple):
    """What the pools gave away: words, and how many there are."""

    words: Any
    count: Any


class _Run(NamedTuple):
    path: Trajectory
    hparams: Tree
    form: FixedPoint
    rule: SGD

    def record(self, z: Inner, log_bits: int | None) -> Recording:
        backend, path, form, length = self.path.backend, self.path, self.form, self.path.length
        start = self._integers(z)
        generator, like = Generator(backend), z.params
        capacity = self._capacity(log_bits)
        log = Log(backend.room(backend.map(lambda i: form.spill(i)[1], start.pool), capacity), self._none())
        fault = self._first(form.overflows(x, backend.zeros(x)) for x in (z.params, z.opt_state.velocity))

        def forward(carry: Any, k: Any, _: Any) -> tuple[Any, Any]:
            at, log, aux, seen, fault = carry
            draws, t = generator.state(), path.start + k
            params = self._numbers(at.params, like)
            value, g, later = inner_gradient(
                backend, path.training.problem, Inner(params, (), aux), self.hparams, path.batch(k)
            )
            ratio, before = self._ratio(t), log.count
            at, log = self._spilled(at, log, ratio)
            at, over = self._advance(at, params, g, ratio, t)
            seen = seen.then(backend, observe(backend, value, g, self._numbers(at.params, like), t))
            return (at, log, later, seen, self._first((fault, over))), (aux, draws, log.count - before)

        begin = start, log, z.aux, Seen.nothing(backend, z.params), fault
        (at, log, aux, seen, fault), kept = backend.scan(forward, begin, path.length)
        fault = self._first((fault, backend.xp.where(log.count <= capacity, -1, LOG_IS_FULL)))
        end = Inner(self._numbers(at.params, like), Momentum(self._numbers(at.velocity, like)), aux)
        words = sum(backend.describe(leaf).nbytes for leaf in backend.flatten(start.pool)[0]) // 2
        held = 3 * vectors.nbytes(backend, start.params) + length * vectors.nbytes(backend, z.aux)
        held = held + words * (capacity if backend.compiles else log.count)
        rest = [at, log]
        del at, log, start, begin
        return Recording(
            end,
            seen,
            path.length,
            lambda v: self._back(rest, kept, v, z, fault),
            held,
            2 * path.length,
            path.length,
        )

    def _back(self, rest: list[Any], kept: Any, v: Inner, z: Inner, fault: Any) -> Pulled:
        """Take the steps back from what is left of the run, and pull back through each."""
        backend, path, like = self.path.backend, self.path, z.params
        sweep = Sweep(path, self.hparams)

        def backward(carry: Any, k: Any, kept: Any) -> tuple[Any, None]:
            # Where nothing compiles, what is not needed any more is let go of at once: it has the size of θ.
            at, log, (v, total) = carry
            del carry
            (aux, draws, spilled), t = kept, path.start + k
            ratio, lr = self._ratio(t), resolve(backend, "lr", self.rule.lr, self.hparams, t)
            at = at._replace(params=self._before(at, lr, like))
            params = self._numbers(at.params, like)

            def slope(params: Tree, hparams: Tree) -> Tree:
                z = Inner(params, (), aux)
                return inner_gradient(backend, path.training.problem, z, hparams, path.batch(k))[1]

            with backend.replay(draws):
                g, pull_slope = backend.vjp(slope, params, self.hparams)
            at = self._withdrawn(at, params, g, ratio, t)
            at, log = self._unspilled(at, log, ratio, spilled)

            def apply(g: Tree, params: Tree, opt_state: Tree, hparams: Tree) -> Any:
                return path.training.apply(g, Inner(params, opt_state, aux), hparams, t)[:2]

            velocity = Momentum(self._numbers(at.velocity, like))
            pull_step = backend.vjp(apply, g, params, velocity, self.hparams)[1]
            u, v_params, v_state, term = pull_step(v[:2])
            reached = pull_step.reached[3]
            del v, g, velocity, pull_step
            more, mixed = pull_slope(u)
            reached = backend.map(or_, reached, pull_slope.reached[1])
            del u, pull_slope
            start = Inner(vectors.add(backend, v_params, more), v_state, backend.zeros(aux))
            pulled = Pulled(vectors.add(backend, term, mixed), reached, start)
            return (at, log, sweep.add(total, pulled)), None

        (at, _, carry), _ = backend.scan(
            backward, (*_handed(rest), sweep.begin(v)), path.length, xs=kept, reverse=True
        )
        given = self._integers(z)
        back = self._equal(at.params, given.params) & self._equal(at.velocity, given.velocity)
        lost = backend.xp.where(back, -1, DID_NOT_COME_BACK)
        return sweep.end(carry)._replace(fault=self._first((fault, lost)))

    # One step.

    def _advance(self, at: Integers, params: Tree, g: Tree, ratio: Ratio, t: Any) -> tuple[Integers, Any]:
        """Step: b ← μ b + fresh, θ ← θ − η b, and the first leaf in which that does not fit."""
        backend, form = self.path.backend, self.form
        fresh = self._fresh(g, params, t)
        pairs = backend.map(lambda b, i: form.shrink(b, i, ratio), at.velocity, at.pool)
        shrunk, pool = self._unzipped(pairs, at.velocity)
        sums = backend.map(lambda b, f: b + form.fixed(f), shrunk, fresh)
        lr = resolve(backend, "lr", self.rule.lr, self.hparams, t)
        change = backend.map(lambda b, like: lr * form.number(b, like), sums, params)
        moved = backend.map(lambda p, c: p - form.fixed(c), at.params, change)
        rest = backend.map(form.number, shrunk, fresh)
        over = self._first((form.overflows(rest, fresh), form.overflows(params, change)))
        return Integers(moved, sums, pool, pooled(at.top, ratio)), over

    def _before(self, at: Integers, lr: Any, like: Tree) -> Tree:
        """The parameters before the step: θ ← θ + η b."""

        def leaf(p: Any, b: Any, like: Any) -> Any:
            return p + self.form.fixed(lr * self.form.number(b, like))

        return self.path.backend.map(leaf, at.params, at.velocity, like)

    def _withdrawn(self, at: Integers, params: Tree, g: Tree, ratio: Ratio, t: Any) -> Integers:
        """The velocity before: b ← (b − fresh) / μ."""
        backend, form = self.path.backend, self.form
        fresh = self._fresh(g, params, t)
        pairs = backend.map(
            lambda b, i, f: form.grow(b - form.fixed(f), i, ratio), at.velocity, at.pool, fresh
        )
        velocity, pool = self._unzipped(pairs, at.velocity)
        return at._replace(velocity=velocity, pool=pool)

    def _fresh(self, g: Tree, params: Tree, t: Any) -> Tree:
        backend, rule = self.path.backend, self.rule
        return rule.damped(backend, rule.decayed(backend, g, params, self.hparams, t), self.hparams, t)

    # The pool and the log.

    def _spilled(self, at: Integers, log: Log, ratio: Ratio) -> tuple[Integers, Log]:
        """Make room in the pools for one more step."""
        backend, form = self.path.backend, self.form

        def spill(carry: tuple[Integers, Log]) -> tuple[Integers, Log]:
            at, log = carry
            pool, low = self._unzipped(backend.map(form.spill, at.pool), at.pool)
            words = backend.put(log.words, log.count, low)
            return at._replace(pool=pool, top=at.top >> form.word), Log(words, log.count + 1)

        full = form.room // ratio.d - 1
        made: tuple[Integers, Log] = backend.while_loop(
            lambda carry: carry[0].top >= full, spill, (at, log), 1
        )
        return made

    def _unspilled(self, at: Integers, log: Log, ratio: Ratio, spilled: Any) -> tuple[Integers, Log]:
        backend, form = self.path.backend, self.form

        def refill(carry: tuple[Integers, Log, Any]) -> tuple[Integers, Log, Any]:
            at, log, left = carry
            low = backend.take(log.words, log.count - 1)
            pool = backend.map(form.refill, at.pool, low)
            return at._replace(pool=pool), Log(log.words, log.count - 1), left - 1

        at, log, _ = backend.while_loop(lambda carry: carry[2] > 0, refill, (at, log, spilled), 1)
        return at, log

    def _capacity(self, log_bits: int | None) -> int:
        """Words of log: one a step is more than enough, and costs nothing where lists grow as they must."""
        length, form = int(self.path.length), self.form
        if not self.path.backend.compiles:
            return length
        momentum = self.rule.momentum
        if log_bits is not None or not isinstance(momentum, float | int):
            return max(1, -(-(log_bits or length) // form.word))
        ratio, top, count = Ratio.of(self.path.backend, momentum, form.dtype), 0, 0
        for _ in range(length):
            if top >= form.room // ratio.d - 1:
                top, count = top >> form.word, count + 1
            top = pooled(top, ratio)
        return max(1, count)

    # Between integers and floats.

    def _integers(self, z: Inner) -> Integers:
        backend, form = self.path.backend, self.form
        params, velocity = (backend.map(form.fixed, x) for x in (z.params, z.opt_state.velocity))
        return Integers(params, velocity, backend.map(lambda x: 0 * x, velocity), self._none())

    def _none(self) -> Any:
        """0, which a compiled loop takes for an integer of the kind that it will be."""
        backend = self.path.backend
        return backend.cast(backend.asarray(0), self.form.dtype) if backend.compiles else 0

    def _numbers(self, integers: Tree, like: Tree) -> Tree:
        return self.path.backend.map(self.form.number, integers, like)

    def _ratio(self, t: Any) -> Ratio:
        backend = self.path.backend
        momentum = resolve(backend, "momentum", self.rule.momentum, self.hparams, t)
        return Ratio.of(backend, momentum, self.form.dtype)

    def _unzipped(self, pairs: Tree, like: Tree) -> tuple[Tree, Tree]:
        """A tree of pairs as a pair of trees."""
        leaves, unflatten = self.path.backend.flatten(pairs)
        _, build = self.path.backend.flatten(like)
        return build(leaves[::2]), build(leaves[1::2])

    def _equal(self, x: Tree, y: Tree) -> Any:
        backend, xp = self.path.backend, self.path.backend.xp
        pairs = zip(backend.flatten(x)[0], backend.flatten(y)[0], strict=True)
        found: Any = True
        for a, b in pairs:
            found = xp.all(a == b) & found
        return found

    def _first(self, faults: Iterable[Any]) -> Any:
        """The first that is none: −1 says that all is well."""
        found: Any = -1
        for fault in reversed(list(faults)):
            found = self.path.backend.xp.where(fault == -1, found, fault)
        return found


def _handed(rest: list[Any]) -> list[Any]:
    """What a list held, which holds it no more."""
    items = list(rest)
    rest.clear()
    return items
