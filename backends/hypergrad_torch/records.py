"""Training steps as they were, to take them again: in an unroll, or after a run was saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad_torch.modules import Buffers
from hypergrad_torch.optimizers import Taken
from hypergrad_torch.randomness import Draws
from hypergrad_torch.training import Snapshot, Trainer


@final
@dataclass(frozen=True, eq=False)
class Record:
    """A training step, as needed to take it again: its batch, draws, buffers, modes and what was taken."""

    batch: Any
    draws: Draws
    buffers: Buffers
    modes: list[bool]
    taken: Taken


class Window(NamedTuple):
    """The training steps that an estimate reaches back over, and where they began."""

    start: Snapshot
    records: tuple[Record, ...] = ()


def write(window: Window) -> dict[str, Any]:
    """Plain containers of tensors, and the batches as they are."""
    records = [
        {
            "batch": r.batch,
            "draws": [r.draws.cpu, *r.draws.cuda],
            "buffers": r.buffers,
            "modes": r.modes,
            "options": [dict(o) for o in r.taken.options],
            "used": list(r.taken.used),
        }
        for r in window.records
    ]
    return {"start": window.start.write(), "records": records}


def read(trainer: Trainer, stored: dict[str, Any]) -> Window:
    """What `write` returned."""
    records = [
        Record(
            r["batch"],
            Draws(r["draws"][0], tuple(r["draws"][1:])),
            r["buffers"],
            r["modes"],
            Taken(r["options"], r["used"]),
        )
        for r in stored["records"]
    ]
    return Window(Snapshot.read(trainer, stored["start"]), tuple(records))
