"""Parameters and optimiser state as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from hypergrad_torch.module.checkpoint import check_kind, check_like, check_state
from hypergrad_torch.module.optimizer_step import Trainer, copied


@final
@dataclass(frozen=True, eq=False)
class Snapshot:
    """Parameters and optimiser state as they were, to compute with and to go back to."""

    trainer: Trainer
    params: dict[str, Tensor]
    state: dict[str, dict[str, Any]]

    @classmethod
    def take(cls, trainer: Trainer) -> Snapshot:
        """Copy what a step of the optimiser is going to change."""
        return cls(trainer, {name: copied(p) for name, p in trainer.params.items()}, trainer.state())

    def restore(self) -> None:
        """Put everything back, in the tensors that hold it."""
        now = self.trainer.optimizer.state
        with torch.no_grad():
            for name, p in self.trainer.params.items():
                p.copy_(self.params[name])
                then = self.state.get(name)
                if then is None:
                    now.pop(p, None)
                    continue
                held = now.get(p, {})
                tensors = {key: x for key, x in held.items() if isinstance(x, Tensor) and key in then}
                now[p] = {
                    key: tensors[key].copy_(x) if key in tensors and isinstance(x, Tensor) else copied(x)
                    for key, x in then.items()
                }

    def restore_state_unless(self, allowed: Tensor) -> None:
        """Put the optimiser's state back where a boolean on the device is false, without reading it.

        Of a state that did not exist zeros are left. Clocks that lie elsewhere go on.
        """
        for name, p in self.trainer.params.items():
            then = self.state.get(name, {})
            for key, x in self.trainer.optimizer.state.get(p, {}).items():
                if isinstance(x, Tensor) and x.device == allowed.device:
                    before = then.get(key)
                    x.copy_(torch.where(allowed, x, torch.zeros_like(x) if before is None else before))

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within the block the optimiser's state reads as it was: for the formula of another step."""
        state, params = self.trainer.optimizer.state, self.trainer.params
        now = {name: state.pop(p) for name, p in params.items() if p in state}
        state.update({params[name]: kept for name, kept in self.state.items()})
        try:
            yield
        finally:
            for name in self.state:
                state.pop(params[name])
            state.update({params[name]: kept for name, kept in now.items()})

    def write(self) -> dict[str, Any]:
        """Plain containers."""
        return {"params": self.params, "state": self.state}

    @classmethod
    def read(cls, trainer: Trainer, stored: Any) -> Snapshot:
        """What `write` returned.

        Raises:
            CheckpointError: if it is a snapshot of other parameters.
        """
        check_kind(stored, dict, "snapshot")
        check_like(stored.get("params"), trainer.values(), "snapshot['params']")
        check_kind(stored.get("state"), dict, "snapshot['state']")
        for name, state in stored["state"].items():
            check_state(state, trainer.optimizer, trainer.params.get(name), f"snapshot['state'][{name!r}]")
        return cls(trainer, stored["params"], stored["state"])
