"""Records of training steps, to replay them: in an unroll, or after a run was saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

from hypergrad_torch.module.checkpoint import check_kind, check_like, check_options, read_draws, write_draws
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
            "draws": write_draws(r.draws),
            "buffers": r.buffers,
            "modes": r.modes,
            "options": [dict(o) for o in r.taken.options],
            "used": list(r.taken.used),
        }
        for r in window.records
    ]
    return {"start": window.start.write(), "records": records}


def read(trainer: Trainer, stored: Any, model: Record, steps: int) -> Window:
    """What `write` returned of so many steps; ``model`` is a record of a step here.

    Raises:
        CheckpointError: if it is a window of other steps.
    """
    check_kind(stored, dict, "window")
    check_kind(stored.get("records"), list, "window['records']", steps)
    here = write(Window(Snapshot.take(trainer), (model,)))["records"][0]
    records = []
    for k, r in enumerate(stored["records"]):
        check_like(r, here, f"window['records'][{k}]", beside=("batch", "draws", "options"))
        draws = read_draws(r["draws"], f"window['records'][{k}]['draws']")
        check_kind(r["options"], list, f"window['records'][{k}]['options']", len(here["options"]))
        for j, o in enumerate(r["options"]):
            check_options(o, trainer.optimizer, j, f"window['records'][{k}]['options'][{j}]")
        records.append(Record(r["batch"], draws, r["buffers"], r["modes"], Taken(r["options"], r["used"])))
    return Window(Snapshot.read(trainer, stored.get("start")), tuple(records))
