"""The tape that keeps a few states, and runs the steps between them again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.problems.step import Inner, Observation
from hypergrad.tapes.base import Generator, Kept, Recording, Shelf, Sweep, Tape
from hypergrad.tapes.revolve import Online, Schedule, forward_steps, schedule
from hypergrad.tapes.trajectory import Pulled, Trajectory

__all__ = ["Binomial", "Schedule", "forward_steps", "schedule"]


@final
@dataclass(frozen=True)
class Binomial(Tape):
    r"""Keep s states, z_0 among them, and reach the others from these in the fewest steps there can be.

    The schedule is that of Griewank and Walther (2000, algorithm 799), see `hypergrad.tapes.revolve`: r T −
    β(s + 1, r − 1) steps are run without being pulled back, none of them more than r times. About 5.4 T
    gradients for T = 1000 in 20 slots, in 20 copies of z.

    A run whose length is not known beforehand is kept by an online variant (Wang, Moin and Iaccarino 2009),
    which needs a few steps more.

    Args:
        slots: s.
        max_bytes: as many slots as fit into so many bytes; either of the two.
        verify: as for `States`.

    Raises:
        ArgumentError: unless one of the two is given, as a positive integer; when used, if not one state
            fits into ``max_bytes``.
    """

    slots: int | None = None
    max_bytes: int | None = None
    verify: bool = False
    open_ended = True

    def __post_init__(self) -> None:
        if (self.slots is None) == (self.max_bytes is None):
            raise ArgumentError("Binomial: give either slots= or max_bytes=")
        for name in ("slots", "max_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"Binomial: {name} = {value!r}; it is a positive integer")

    def places(self, backend: Backend, z: Inner) -> int:
        """How many states like this one are kept."""
        if self.slots is not None:
            return self.slots
        assert self.max_bytes is not None
        size = vectors.nbytes(backend, z)
        if size > self.max_bytes:
            raise ArgumentError(
                f"Binomial: one state takes {size} bytes, and max_bytes = {self.max_bytes} hold none: give "
                "more, put the states elsewhere by hg.Offload, or take hg.Reversible, which keeps none"
            )
        return self.max_bytes // max(size, 1)

    def record(self, path: Trajectory, z: Inner, hparams: Tree, shelf: Shelf | None = None) -> Recording:
        slots = self.places(path.backend, z)
        run = _Run(path.verified(self.verify, z), hparams, shelf or Shelf(), Generator(path.backend))
        return run.online(z, slots) if path.length is None else run.planned(z, slots)


class _Table(NamedTuple):
    """A schedule as arrays: what the rounds and the moves are, and which moves belong to which round."""

    rounds: Any
    moves: Any

    @classmethod
    def of(cls, backend: Backend, plan: Schedule) -> _Table:
        moves = [move for each in plan.rounds for move in each.moves]
        rounds, done = [], 0
        for each in plan.rounds:
            rounds.append((each.step, each.slot, done, done + len(each.moves)))
            done += len(each.moves)
        # A first move puts nothing away: its state is in a slot already.
        rows = [(m.start, m.start + m.count, -1 if m.slot is None else m.slot) for m in moves]
        return cls(backend.stack(rounds), backend.stack(rows or [(0, 0, -1)]))


class _Run(NamedTuple):
    """One run, and what is needed to take parts of it again."""

    path: Trajectory
    hparams: Tree
    shelf: Shelf
    generator: Generator
    first: int = 0
    """The place on the shelf of the first slot."""

    def planned(self, z: Inner, slots: int) -> Recording:
        backend, length = self.path.backend, self.path.length
        plan = schedule(length, min(slots, length))
        first = self._kept(z, 0)
        table, kept = (
            _Table.of(backend, plan),
            backend.set_row(backend.empty_rows(first, plan.slots), 0, first),
        )

        # The first round runs for the first time: it is looked at.
        def observe(carry: tuple[Inner, Observation], k: Any) -> tuple[Inner, Observation]:
            z, observed = carry
            z, later = self.path.step(z, self.hparams, k)
            return z, observed.then(backend, later)

        kept, (z, before) = self._go(table, kept, 0, (z, Observation.none(backend, z.params)), observe)
        end, last, observed = backend.vjp(
            lambda z, hparams: self.path.step(z, hparams, length - 1), z, self.hparams
        )

        def pull_last(v: Inner) -> Pulled:
            start, term = last(v)
            return Pulled(term, last.reached[1], start)

        return Recording(
            end,
            before.then(backend, observed),
            length,
            lambda v: self._back(table, kept, v, pull_last, 1, length),
            plan.slots * vectors.nbytes(backend, z),
            length + plan.forward_steps,
            length,
        )

    def online(self, z: Inner, slots: int) -> Recording:
        backend, held, k = self.path.backend, Online(slots), 0
        kept, places = list[Kept](), list[int]()
        observed = Observation.none(backend, z.params)
        while True:
            draws = self.generator.state()
            try:
                self.path.batch(k)
            except StopIteration:
                backend.random.restore(draws)
                break
            if (i := held.visit(k)) is not None:
                place = places.pop(i) if i < len(places) else i
                del kept[i : i + 1]
                kept.append(Kept(self.shelf.put(z, place), draws))
                places.append(place)
            backend.random.restore(draws)
            z, later = self.path.step(z, self.hparams, k)
            observed, k = observed.then(backend, later), k + 1
        if k == 0:
            raise ArgumentError("train (T1) is empty: at least one batch is needed")
        plan = held.schedule(k)
        # The states lie in no order, and the way back puts others where these are not.
        run = self._replace(path=replace(self.path, length=k), first=slots)
        kept.extend([None] * slots)  # type: ignore[list-item]
        return Recording(
            z,
            observed,
            k,
            lambda v: run._back(_Table.of(backend, plan), kept, v, None, 0, k),
            len(plan.held) * vectors.nbytes(backend, z),
            2 * k + plan.forward_steps,
            k,
        )

    def _kept(self, z: Inner, place: Any) -> Kept:
        return Kept(self.shelf.put(z, self.first + place), self.generator.state())

    def _go(self, table: _Table, kept: Any, r: Any, state: Any, advance: Any) -> tuple[Any, Any]:
        """The moves of one round, from its first state on."""
        backend, limit = self.path.backend, self.path.length
        _, _, first, stop = backend.take(table.rounds, r)

        def move(carry: tuple[Any, Any, Any], puts: bool = True) -> tuple[Any, Any, Any]:
            j, kept, state = carry
            begin, end, slot = backend.take(table.moves, j)
            if puts:
                kept = backend.set_row(kept, slot, self._kept(state[0], slot))
            _, state = backend.while_loop(
                lambda at: at[0] < end, lambda at: (at[0] + 1, advance(at[1], at[0])), (begin, state), limit
            )
            return j + 1, kept, state

        # The first move of a round, if there is one.
        j, _, state = backend.while_loop(
            lambda carry: (carry[0] < stop) & (carry[0] == first),
            lambda carry: (*move((carry[0], None, carry[2]), puts=False),),
            (first, None, state),
            1,
        )
        _, kept, state = backend.while_loop(lambda carry: carry[0] < stop, move, (j, kept, state), limit)
        return kept, state

    def _back(self, table: _Table, kept: Any, v: Inner, last: Any, done: int, length: int) -> Pulled:
        """Pull back through the rounds from ``done`` on; the last steps of all may be at hand already."""
        backend, sweep = self.path.backend, Sweep(self.path, self.hparams)
        carry = sweep.begin(v)
        if last is not None:
            carry = sweep.add(carry[1], last(v))

        def one_round(carry: Any, r: Any, _: Any) -> tuple[Any, None]:
            kept, adjoint = carry
            step, slot, _, _ = backend.take(table.rounds, r + done)
            found = backend.take(kept, slot)
            with backend.random.replay(found.draws):
                state = (self.shelf.take(found.z),)
                kept, (z,) = self._go(
                    table, kept, r + done, state, lambda at, k: (self.path.replay(at[0], self.hparams, k),)
                )
                return (kept, sweep.step(z, step, adjoint)), None

        (_, carry), _ = backend.scan(one_round, (kept, carry), length - done)
        return sweep.end(carry)
