"""The tape that keeps a few states, and replays the steps between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

from hypergrad.backend import Backend, Scalar, Tree, vectors
from hypergrad.errors import ArgumentError
from hypergrad.problems.step import Inner, Observation
from hypergrad.tapes.base import Checkpoint, Generator, Recording, Storage, Sweep, Tape
from hypergrad.tapes.revolve import Online, Schedule, forward_steps, schedule
from hypergrad.tapes.trajectory import Pulled, Trajectory

__all__ = ["Binomial", "Schedule", "forward_steps", "schedule"]


@final
@dataclass(frozen=True)
class Binomial(Tape):
    r"""Keep s states, z_0 among them, and recompute the others from these in the fewest possible steps.

    The schedule is that of Griewank and Walther (2000, algorithm 799), see `hypergrad.tapes.revolve`: r T −
    β(s + 1, r − 1) steps are run without being pulled back, none of them more than r times. About 5.4 T
    gradients for T = 1000 and 20 slots, which hold 20 copies of z.

    A run whose length is not known beforehand uses an online variant (Wang, Moin and Iaccarino 2009), which
    needs a few steps more.

    Args:
        slots: s.
        max_bytes: instead of ``slots``, use as many as fit into so many bytes.
        verify: as for `States`.

    Raises:
        ArgumentError: unless exactly one of the two is given, as a positive integer; when used, if a single
            state does not fit into ``max_bytes``.
    """

    slots: int | None = None
    max_bytes: int | None = None
    verify: bool = False
    open_ended = True

    def __post_init__(self) -> None:
        if (self.slots is None) == (self.max_bytes is None):
            raise ArgumentError("Binomial: pass either slots= or max_bytes=")
        for name in ("slots", "max_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"Binomial: {name} = {value!r}; it must be a positive integer")

    def places(self, backend: Backend, z: Inner) -> int:
        """Return how many states like this one are kept."""
        if self.slots is not None:
            return self.slots
        assert self.max_bytes is not None
        size = vectors.nbytes(backend, z)
        if size > self.max_bytes:
            raise ArgumentError(
                f"Binomial: one state takes {size} bytes, more than max_bytes = {self.max_bytes}: raise it, "
                "store the states elsewhere with hg.Offload, or use hg.Reversible, which keeps none"
            )
        return self.max_bytes // max(size, 1)

    def record(self, path: Trajectory, z: Inner, hparams: Tree, storage: Storage | None = None) -> Recording:
        slots = self.places(path.backend, z)
        run = _Run(path.verified(self.verify, z), hparams, storage or Storage(), Generator(path.backend))
        return run.online(z, slots) if path.length is None else run.planned(z, slots)


class _Table(NamedTuple):
    """A schedule as arrays.

    A row of ``rounds`` is (step, slot, first move, end of the moves); a row of ``moves`` is (first step, end
    of the steps, slot or −1).
    """

    rounds: Any
    moves: Any

    @classmethod
    def of(cls, backend: Backend, plan: Schedule) -> _Table:
        moves = [move for each in plan.rounds for move in each.moves]
        rounds, done = [], 0
        for each in plan.rounds:
            rounds.append((each.step, each.slot, done, done + len(each.moves)))
            done += len(each.moves)
        # The first move of a round stores nothing: its state is in a slot already.
        rows = [(m.start, m.start + m.count, -1 if m.slot is None else m.slot) for m in moves]
        return cls(backend.stack(rounds), backend.stack(rows or [(0, 0, -1)]))


class _Run(NamedTuple):
    """One run, and what is needed to replay parts of it."""

    path: Trajectory
    hparams: Tree
    storage: Storage
    generator: Generator
    first: int = 0
    """The number of the first slot in the storage."""

    def planned(self, z: Inner, slots: int) -> Recording:
        backend, length = self.path.backend, self.path.length
        plan = schedule(length, min(slots, length))
        table, first = _Table.of(backend, plan), self._checkpoint(z, 0)
        checkpoints = backend.set_row(backend.empty_rows(first, plan.slots), 0, first)

        # The moves of the first round run their steps for the first time, so they are observed.
        def observe(carry: tuple[Inner, Observation], k: Any) -> tuple[Inner, Observation]:
            return self.path.step(*carry, self.hparams, k)

        start = z, self.path.unobserved(z)
        checkpoints, (z, before) = self._make_moves(table, checkpoints, 0, start, observe)
        end, last, observed = backend.vjp(
            lambda z, hparams: self.path.step(z, before, hparams, length - 1), z, self.hparams
        )

        def pull_last(v: Inner) -> Pulled:
            start, term = last(v)
            return Pulled(term, last.reached[1], start)

        return Recording(
            end,
            observed,
            length,
            lambda v: self._pull_back(table, checkpoints, v, pull_last, 1, length),
            plan.slots * vectors.nbytes(backend, z),
            length + plan.forward_steps,
            length,
        )

    def online(self, z: Inner, slots: int) -> Recording:
        backend, held, k = self.path.backend, Online(slots), 0
        checkpoints, places = list[Checkpoint](), list[int]()
        observed, values = self.path.unobserved(z), list[Scalar]()
        while True:
            draws = self.generator.state()
            try:
                self.path.batch(k)
            except StopIteration:
                self.generator.restore(draws)
                break
            if (i := held.visit(k)) is not None:
                place = places.pop(i) if i < len(places) else i
                del checkpoints[i : i + 1]
                checkpoints.append(Checkpoint(self.storage.put(z, place), draws))
                places.append(place)
            self.generator.restore(draws)
            z, observed = self.path.step(z, observed, self.hparams, k)
            values.append(observed.inner_value)
            k += 1
        if k == 0:
            raise ArgumentError("train (T1) is empty: at least one batch is needed")
        plan = held.schedule(k)
        # The stored states are in no order, so the backward sweep stores its own in other places.
        run = self._replace(path=replace(self.path, length=k), first=slots)
        checkpoints.extend([None] * slots)  # type: ignore[list-item]
        return Recording(
            z,
            observed._replace(inner_values=backend.stack(values)),
            k,
            lambda v: run._pull_back(_Table.of(backend, plan), checkpoints, v, None, 0, k),
            len(plan.held) * vectors.nbytes(backend, z),
            2 * k + plan.forward_steps,
            k,
        )

    def _checkpoint(self, z: Inner, slot: Any) -> Checkpoint:
        return Checkpoint(self.storage.put(z, self.first + slot), self.generator.state())

    def _make_moves(
        self, table: _Table, checkpoints: Any, r: Any, state: Any, advance: Any
    ) -> tuple[Any, Any]:
        """Make the moves of round r, starting from its first state."""
        backend, limit = self.path.backend, self.path.length
        _, _, first, stop = backend.take(table.rounds, r)

        def move(carry: tuple[Any, Any, Any], stores: bool = True) -> tuple[Any, Any, Any]:
            j, checkpoints, state = carry
            begin, end, slot = backend.take(table.moves, j)
            if stores:
                checkpoints = backend.set_row(checkpoints, slot, self._checkpoint(state[0], slot))
            _, state = backend.while_loop(
                lambda at: at[0] < end, lambda at: (at[0] + 1, advance(at[1], at[0])), (begin, state), limit
            )
            return j + 1, checkpoints, state

        # The first move of a round, if there is one.
        j, _, state = backend.while_loop(
            lambda carry: (carry[0] < stop) & (carry[0] == first),
            lambda carry: (*move((carry[0], None, carry[2]), stores=False),),
            (first, None, state),
            1,
        )
        _, checkpoints, state = backend.while_loop(
            lambda carry: carry[0] < stop, move, (j, checkpoints, state), limit
        )
        return checkpoints, state

    def _pull_back(
        self, table: _Table, checkpoints: Any, v: Inner, last: Any, done: int, length: int
    ) -> Pulled:
        """Pull back through the rounds from ``done`` on; ``last``, if given, does so through those before."""
        backend, sweep = self.path.backend, Sweep(self.path, self.hparams)
        carry = sweep.begin(v)
        if last is not None:
            carry = sweep.add(carry[1], last(v))

        def one_round(carry: Any, r: Any, _: Any) -> tuple[Any, None]:
            checkpoints, adjoint = carry
            step, slot, _, _ = backend.take(table.rounds, r + done)
            checkpoint = backend.take(checkpoints, slot)

            def replay(state: tuple[Inner], k: Any) -> tuple[Inner]:
                return (self.path.replay(state[0], self.hparams, k),)

            with self.generator.replay(checkpoint.draws):
                start = (self.storage.take(checkpoint.z),)
                checkpoints, (z,) = self._make_moves(table, checkpoints, r + done, start, replay)
                return (checkpoints, sweep.step(z, step, adjoint)), None

        (_, carry), _ = backend.scan(one_round, (checkpoints, carry), length - done)
        return sweep.end(carry)
