"""Records of training steps, to replay them: in an unroll, or after a run was saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad_torch.module.functional import Buffers
from hypergrad_torch.module.optimizer_step import Trainer
from hypergrad_torch.module.snapshot import Snapshot
from hypergrad_torch.optimizers import Taken
from hypergrad_torch.randomness import Draws


@final
@dataclass(frozen=True, eq=False)
class Record:
    """What a training step began with: its batch, generators, buffers, modes and the optimiser's options."""

    batch: Any
    draws: Draws
    buffers: Buffers
    modes: list[bool]
    taken: Taken


class Window(NamedTuple):
    """The training steps that an estimate differentiates through, and where they began."""

    start: Snapshot
    records: tuple[Record, ...] = ()


def write(window: Window) -> dict[str, Any]:
    """Return plain containers of tensors, and the batches unchanged."""
    records = [
        {
            "batch": r.batch,
            "draws": [r.draws.cpu, *r.draws.devices],
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
