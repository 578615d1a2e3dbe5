"""The tape that keeps no states, and runs training backwards instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import or_
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.problems.step import Inner, inner_gradient, observe
from hypergrad.tapes.base import Generator, Recording, Sweep, Tape
from hypergrad.tapes.reversible.fixedpoint import SPILLS, WORD, FixedPoint, Ratio, digits
from hypergrad.tapes.reversible.integers import Integers, Leaves, Rates, Steps
from hypergrad.tapes.reversible.log import EACH, Log
from hypergrad.tapes.trajectory import Pulled, Trajectory
from hypergrad.updates.formula import is_off
from hypergrad.updates.sgd import SGD, Momentum

NOT_RECOVERED, LOG_IS_FULL = -2, -3
"""Fault codes: −1 is no fault, and a number from 0 on is the leaf that did not fit."""


@final
@dataclass(frozen=True)
class Reversible(Tape):
    r"""Keep only the last state, and undo every step of momentum SGD exactly (Maclaurin et al. 2015).

        b_{t+1} = μ b_t + (1 − δ) (g_t + w θ_t),    θ_{t+1} = θ_t − η b_{t+1}
        θ_t = θ_{t+1} + η b_{t+1},    b_t = (b_{t+1} − (1 − δ) (g_t + w θ_t)) / μ

    in integers, so that θ_0 and b_0 are recovered bit for bit: see `hypergrad.tapes.reversible.fixedpoint`.
    The run agrees with that of `hypergrad.SGD` up to the rounding of fixed point, 2^−F, and so does the
    hypergradient. Rates, momentum and their schedules may be hyperparameters.

    Cost: 4 T gradients. Memory: parameters and velocity, a pool of 16 bits for each parameter, and log2(1/μ)
    bits for each parameter and step, 0.15 for μ = 0.9; the auxiliary state and the generator's are stored for
    each step, if there are any. The recovered state is compared with the initial one; in a compiled program
    only their digests are, so that the state may be donated, as in ``jax.jit(…, donate_argnums=…)``, which
    saves two copies. A momentum on a device is read.

    Args:
        fraction: F, the bits after the point; 48 of 64 for float64 and 24 of 32 for narrower parameters, in
            which numbers below 2^15 and 2^7 fit.
        log_bits: bits that a compiled program reserves for the log of each parameter, if the momentum is
            traced; by default one a step, which is enough for μ ≥ ½. Otherwise the needed size is known.

    Raises:
        ArgumentError: for an update rule other than SGD with heavy-ball momentum: a step without momentum
            cannot be undone, Adam divides by what it loses, and recovering the parameters before a Nesterov
            step needs their gradient.
        UnsupportedOpError: if the hypergradient is differentiated, because integers have no derivative.
        FixedPointError: when used, if a number does not fit, or the initial state is not recovered.
    """

    fraction: int | None = None
    log_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("fraction", "log_bits"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"Reversible: {name} = {value!r}; it must be a positive integer")

    def numbers(self, backend: Backend, params: Tree) -> FixedPoint:
        """Return the fixed-point form of these parameters."""
        bits = 64 if backend.describe(backend.flatten(params)[0][0]).itemsize > 4 else 32
        fraction = (48 if bits == 64 else 24) if self.fraction is None else self.fraction
        if fraction > bits - 4:
            raise ArgumentError(f"Reversible: fraction = {fraction}; at most {bits - 4} of {bits} bits fit")
        return FixedPoint(backend, bits, fraction)

    def record(self, path: Trajectory, z: Inner, hparams: Tree) -> Recording:
        backend = path.backend
        z, hparams = backend.nondifferentiable((z, hparams), "hg.Reversible")
        if any(map(backend.is_fixed, backend.flatten(z.params)[0])):
            raise ArgumentError(
                "Reversible: some parameters have requires_grad=False, and its integers cannot leave them "
                "out: pass the trained ones alone, or use hg.Binomial or hg.States"
            )
        run = _Run(path, hparams, self.numbers(path.backend, z.params), _momentum_sgd(path.training.update))
        return run.record(z, self.log_bits)


def _momentum_sgd(rule: Any) -> SGD:
    """Return the SGD rule, if its steps can be undone."""
    instead = "use hg.Binomial or hg.States"
    rule = rule.formula
    if not isinstance(rule, SGD):
        raise ArgumentError(
            f"Reversible undoes steps of hg.SGD with momentum, and those of {type(rule).__name__} cannot be "
            f"undone exactly: {instead}"
        )
    if is_off(rule.momentum):
        raise ArgumentError(f"Reversible: a step without momentum cannot be undone exactly: {instead}")
    if rule.nesterov:
        raise ArgumentError(
            "Reversible: recovering the parameters before a Nesterov step needs their gradient: " + instead
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
        # Keeping only the digest lets a compiled program reuse the memory of the initial state.
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
            path.note(k, value)
            at, log = log.take_in(backend, self.form, at, ratio)
            at, misfit = steps.advance(at, list(backend.flatten(g)[0]), rates, ratio)
            observed = observed.then(backend, observe(backend, value, g, self._params(at, like), t), k)
            return (at, log, later, observed, self._first(fault, misfit)), (aux, draws, log.count - before)

        begin = at, log, z.aux, path.unobserved(z), fault
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
            cotangent = [v]  # a list, so that `_pull_back` can release it
            del v
            return self._pull_back(at, log, kept, cotangent, z, digest, fault, generator)

        return Recording(end, observed, length, pull, held, 2 * length, length)

    def _pull_back(
        self,
        at: Integers,
        log: Log,
        kept: Any,
        cotangent: list[Inner],
        z: Inner,
        digest: Any,
        fault: Any,
        generator: Generator,
    ) -> Pulled:
        """Undo the steps from the last to the first, and pull back through each."""
        backend, path, like = self.path.backend, self.path, z.params
        steps, sweep = self._steps(like), Sweep(path, self.hparams)
        unflatten = backend.flatten(like)[1]

        def backward(carry: Any, k: Any, kept: Any) -> tuple[Any, None]:
            at, log, (v, c, next_momentum), total = carry
            (aux, draws, spilled), t = kept, path.start + k
            rates, pull_rates = self._rates(self.hparams, t, like), self._learned(t, like)
            learned = pull_rates is not None
            at, slope_in_lr = steps.undo_params(at, v, c, next_momentum, rates, learned)
            params = self._params(at, like)

            def slope(params: Tree, hparams: Tree) -> Tree:
                z = Inner(params, (), aux)
                value, g, _ = inner_gradient(backend, path.training.problem, z, hparams, path.batch(k))
                path.compare(k, value)
                return g

            with generator.replay(draws):
                g, pull_slope = backend.pullback(slope, params, self.hparams)
            reached = pull_slope.reached[1]
            ratio = Ratio.of(backend, rates.momentum, self.form.dtype)
            leaves = backend.flatten(g)[0]
            del g
            slopes = Rates(slope_in_lr, *steps.undo_velocity(at, c, leaves, rates, ratio, learned))
            at, log = log.give_back(backend, self.form, at, spilled)
            through_g, term = pull_slope.last(unflatten(steps.shared(c, rates)))
            del pull_slope
            if pull_rates is not None:
                by_rates, reached_by_rates = pull_rates(slopes)
                term = vectors.add(backend, term, by_rates)
                reached = backend.map(or_, reached, reached_by_rates)
            leaves = backend.flatten(through_g)[0]
            del through_g
            steps.pull(v, c, leaves, rates)
            _, total = sweep.add(total, Pulled(term, reached, z))
            return (at, log, (v, c, number(rates.momentum)), total), None

        def number(rate: Any) -> Any:
            return backend.cast(rate, steps.kinds[0]) if backend.compiles else rate

        v, c = (backend.flatten(x)[0] for x in _parts(cotangent.pop()))
        for k in range(len(v)):
            v[k], c[k] = backend.copy(v[k]), backend.copy(c[k])
        begin = steps.split(at), log, (v, c, number(1.0)), sweep.begin(z)[1]
        (at, log, (v, c, momentum), total), _ = backend.scan(
            backward, begin, path.length, xs=kept, reverse=True
        )
        same = steps.agree(steps.digest(at), digest) if digest else steps.is_at(at, *_leaves(backend, z))
        lost = backend.xp.where(same, -1, NOT_RECOVERED)
        start = Inner(unflatten(v), Momentum(unflatten(steps.scaled(momentum, c))), backend.zeros(z.aux))
        return sweep.end((start, total))._replace(fault=self._first(fault, lost))

    def _steps(self, like: Tree) -> Steps:
        leaves = self.path.backend.flatten(like)[0]
        return Steps(self.path.backend, self.form, tuple(map(self.form.wide, leaves)))

    def _params(self, at: Integers, like: Tree) -> Tree:
        """Return the parameters at which the loss is evaluated."""
        backend = self.path.backend
        leaves, unflatten = backend.flatten(like)
        pairs = zip(at.params, leaves, strict=True)
        return unflatten([backend.cast(near, backend.describe(x).dtype) for near, x in pairs])

    def _rates(self, hparams: Tree, t: Any, like: Tree) -> Rates:
        backend = self.path.backend
        return Rates.of(self.rule, backend, hparams, t, backend.flatten(like)[0][0])

    def _learned(self, t: Any, like: Tree) -> Callable[[Rates], tuple[Tree, Tree]] | None:
        """Return a function that pulls slopes in the rates back to λ, and says which leaves they reach.

        Return ``None`` if no rate depends on a hyperparameter.
        """
        backend, rule = self.path.backend, self.rule
        hypers = rule.lr, rule.momentum, rule.weight_decay, rule.dampening
        learned = [not isinstance(hyper, float | int) for hyper in hypers]
        if not any(learned):
            return None

        def pick(rates: Rates) -> list[Any]:
            return [rate for rate, on in zip(rates, learned, strict=True) if on]

        values, pull = backend.pullback(lambda hparams: pick(self._rates(hparams, t, like)), self.hparams)
        reached = pull.reached[0]
        if not any(backend.flatten(reached)[0]):
            return None

        def pull_rates(slopes: Rates) -> tuple[Tree, Tree]:
            pairs = zip(pick(slopes), values, strict=True)
            return pull([backend.cast(x, backend.describe(value).dtype) for x, value in pairs])[0], reached

        return pull_rates

    def _capacity(self, log_bits: int | None) -> int:
        """Return the capacity of the log in words: a generous bound where it is a list that can grow."""
        length, momentum, backend = int(self.path.length), self.rule.momentum, self.path.backend
        if not backend.compiles:
            return SPILLS * length
        if log_bits is None and isinstance(momentum, float | int):
            count = digits(Ratio.of(backend, momentum, self.form.dtype), length)
            return max(1, -(-count // EACH))
        return max(1, -(-(log_bits or length) // WORD))

    def _first(self, fault: Any, other: Any) -> Any:
        """Return the first of two faults, or −1 if there is none."""
        return self.path.backend.xp.where(fault == -1, other, fault)


def _parts(z: Inner) -> tuple[Tree, Tree]:
    return z.params, z.opt_state.velocity


def _leaves(backend: Backend, z: Inner) -> tuple[Leaves, Leaves]:
    """Return the leaves of parameters and velocity, in new lists."""
    params, velocity = _parts(z)
    return list(backend.flatten(params)[0]), list(backend.flatten(velocity)[0])
