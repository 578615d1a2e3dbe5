"""The tape that keeps no states: training runs backwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import or_
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.problems.step import Inner, Observation, inner_gradient, observe
from hypergrad.tapes.base import Generator, Recording, Sweep, Tape
from hypergrad.tapes.reversible.fixedpoint import SPILLS, WORD, FixedPoint, Ratio, digits
from hypergrad.tapes.reversible.integers import Integers, Leaves, Rates, Steps
from hypergrad.tapes.reversible.log import EACH, Log
from hypergrad.tapes.trajectory import Pulled, Trajectory
from hypergrad.updates.base import is_off
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

    Cost: 4 T gradients. Memory: parameters and velocity, a pool of 16 bits for each parameter, and log2(1/μ)
    bits for each parameter and step, 0.15 for μ = 0.9; the auxiliary state and the generator's are kept for
    each step, if there are such. What comes back is compared with what was given; in a compiled program by a
    digest, so that one may hand over the state, as in ``jax.jit(…, donate_argnums=…)``, and hold two copies
    less. The momentum is read, if it lies on a device.

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
        z, hparams = path.backend.nondifferentiable((z, hparams), "hg.Reversible")
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


class _Run(NamedTuple):
    path: Trajectory
    hparams: Tree
    form: FixedPoint
    rule: SGD

    def record(self, z: Inner, log_bits: int | None) -> Recording:
        backend, path, length = self.path.backend, self.path, self.path.length
        generator, like = Generator(backend), z.params
        steps = self._steps(like)
        at, fault = steps.begin(*_leaves(backend, z))
        # Who keeps nothing but the digest lets a program put its results where it was given the state.
        digest = steps.digest(at) if backend.compiles else None
        capacity = self._capacity(log_bits)
        log = Log.begin(backend, at, capacity)

        def forward(carry: Any, k: Any, _: Any) -> tuple[Any, Any]:
            at, log, aux, observed, fault = carry
            del carry
            draws, t = generator.state(), path.start + k
            value, g, later = inner_gradient(
                backend,
                path.training.problem,
                Inner(self._params(at, like), (), aux),
                self.hparams,
                path.batch(k),
            )
            rates, before = self._rates(self.hparams, t, like), log.count
            ratio = Ratio.of(backend, rates.momentum, self.form.dtype)
            at, log = log.take_in(backend, self.form, at, ratio)
            at, over = steps.advance(at, list(backend.flatten(g)[0]), rates, ratio)
            observed = observed.then(backend, observe(backend, value, g, self._params(at, like), t))
            return (at, log, later, observed, self._first(fault, over)), (aux, draws, log.count - before)

        begin = at, log, z.aux, Observation.none(backend, z.params), fault
        (at, log, aux, observed, fault), kept = backend.scan(forward, begin, path.length)
        fault = self._first(fault, backend.xp.where(log.length <= capacity, -1, LOG_IS_FULL))
        flat, unflatten = backend.flatten(like)
        velocity = [
            backend.cast(self.form.number(b, kind), backend.describe(x).dtype)
            for b, kind, x in zip(at.velocity, steps.kinds, flat, strict=True)
        ]
        end = Inner(self._params(at, like), Momentum(unflatten(velocity)), aux)
        del velocity, begin
        at = steps.joined(at)
        held = vectors.nbytes(backend, (at.params, at.velocity, at.pool)) + length * vectors.nbytes(
            backend, z.aux
        )
        words = capacity if backend.compiles else log.length
        held = held + words * vectors.size(backend, at.pool)

        def pull(v: Inner) -> Pulled:
            handed = [v]
            del v
            return self._back(at, log, kept, handed, z, digest, fault)

        return Recording(end, observed, length, pull, held, 2 * length, length)

    def _back(
        self, at: Integers, log: Log, kept: Any, handed: list[Inner], z: Inner, digest: Any, fault: Any
    ) -> Pulled:
        """Take the steps back from where the run ended, and pull back through each."""
        backend, path, like = self.path.backend, self.path, z.params
        steps, sweep = self._steps(like), Sweep(path, self.hparams)
        unflatten = backend.flatten(like)[1]

        def backward(carry: Any, k: Any, kept: Any) -> tuple[Any, None]:
            at, log, (v, c, after), total = carry
            (aux, draws, spilled), t = kept, path.start + k
            rates, pull_rates = self._rates(self.hparams, t, like), self._learned(t, like)
            wanted = pull_rates is not None
            at, slope_in_lr = steps.before(at, v, c, after, rates, wanted)
            params = self._params(at, like)

            def slope(params: Tree, hparams: Tree) -> Tree:
                z = Inner(params, (), aux)
                return inner_gradient(backend, path.training.problem, z, hparams, path.batch(k))[1]

            with backend.random.replay(draws):
                g, pull_slope = backend.pullback(slope, params, self.hparams)
            reached = pull_slope.reached[1]
            ratio = Ratio.of(backend, rates.momentum, self.form.dtype)
            leaves = backend.flatten(g)[0]
            del g
            slopes = Rates(slope_in_lr, *steps.withdraw(at, c, leaves, rates, ratio, wanted))
            at, log = log.give_back(backend, self.form, at, spilled)
            more, term = pull_slope.last(unflatten(steps.shared(c, rates)))
            del pull_slope
            if pull_rates is not None:
                by_rates, found = pull_rates(slopes)
                term = vectors.add(backend, term, by_rates)
                reached = backend.map(or_, reached, found)
            leaves = backend.flatten(more)[0]
            del more
            steps.pull(v, c, leaves, rates)
            _, total = sweep.add(total, Pulled(term, reached, z))
            return (at, log, (v, c, number(rates.momentum)), total), None

        def number(rate: Any) -> Any:
            return backend.cast(rate, steps.kinds[0]) if backend.compiles else rate

        v, c = (backend.flatten(x)[0] for x in _parts(handed.pop()))
        for k in range(len(v)):
            v[k], c[k] = backend.copy(v[k]), backend.copy(c[k])
        begin = steps.split(at), log, (v, c, number(1.0)), sweep.begin(z)[1]
        (at, log, (v, c, after), total), _ = backend.scan(backward, begin, path.length, xs=kept, reverse=True)
        back = steps.agree(steps.digest(at), digest) if digest else steps.is_at(at, *_leaves(backend, z))
        lost = backend.xp.where(back, -1, DID_NOT_COME_BACK)
        start = Inner(unflatten(v), Momentum(unflatten(steps.scaled(after, c))), backend.zeros(z.aux))
        return sweep.end((start, total))._replace(fault=self._first(fault, lost))

    def _steps(self, like: Tree) -> Steps:
        leaves = self.path.backend.flatten(like)[0]
        return Steps(self.path.backend, self.form, tuple(map(self.form.wide, leaves)))

    def _params(self, at: Integers, like: Tree) -> Tree:
        """The parameters at which the loss is taken."""
        backend = self.path.backend
        leaves, unflatten = backend.flatten(like)
        pairs = zip(at.params, leaves, strict=True)
        return unflatten([backend.cast(near, backend.describe(x).dtype) for near, x in pairs])

    def _rates(self, hparams: Tree, t: Any, like: Tree) -> Rates:
        backend = self.path.backend
        return Rates.of(self.rule, backend, hparams, t, backend.flatten(like)[0][0])

    def _learned(self, t: Any, like: Tree) -> Callable[[Rates], tuple[Tree, Tree]] | None:
        """What takes slopes in the rates to hyperparameters, and says to which; or nothing does."""
        backend, rule = self.path.backend, self.rule
        given = rule.lr, rule.momentum, rule.weight_decay, rule.dampening
        learned = [not isinstance(rate, float | int) for rate in given]
        if not any(learned):
            return None

        def those(rates: Rates) -> list[Any]:
            return [rate for rate, on in zip(rates, learned, strict=True) if on]

        values, pull = backend.pullback(lambda hparams: those(self._rates(hparams, t, like)), self.hparams)
        reached = pull.reached[0]
        if not any(backend.flatten(reached)[0]):
            return None

        def back(slopes: Rates) -> tuple[Tree, Tree]:
            pairs = zip(those(slopes), values, strict=True)
            return pull([backend.cast(x, backend.describe(value).dtype) for x, value in pairs])[0], reached

        return back

    def _capacity(self, log_bits: int | None) -> int:
        """Words of log: one a step is more than enough, and costs nothing where lists grow as they must."""
        length, momentum, backend = int(self.path.length), self.rule.momentum, self.path.backend
        if not backend.compiles:
            return SPILLS * length
        if log_bits is None and isinstance(momentum, float | int):
            count = digits(Ratio.of(backend, momentum, self.form.dtype), length)
            return max(1, -(-count // EACH))
        return max(1, -(-(log_bits or length) // WORD))

    def _first(self, fault: Any, other: Any) -> Any:
        """The first of two that is none: −1 says that all is well."""
        return self.path.backend.xp.where(fault == -1, other, fault)


def _parts(z: Inner) -> tuple[Tree, Tree]:
    return z.params, z.opt_state.velocity


def _leaves(backend: Backend, z: Inner) -> tuple[Leaves, Leaves]:
    """Those of parameters and velocity, in lists of their own."""
    params, velocity = _parts(z)
    return list(backend.flatten(params)[0]), list(backend.flatten(velocity)[0])
