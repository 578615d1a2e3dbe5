"""Loops whose conditions may lie on a device, which they do not wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypergrad.backend import Tree
from hypergrad.backend.loops import Loops
from hypergrad_torch.private import read_later

BLOCK = 10
"""Rounds of a loop between two looks at its condition, where that lies on a device."""


class TorchLoops(Loops):
    """Python's loops, in which a condition or an index may be a tensor."""

    def while_loop(
        self, going: Callable[[Tree], Any], body: Callable[[Tree], Tree], carry: Tree, limit: int
    ) -> Tree:
        earlier = None
        for k in range(limit):
            on = going(carry)
            if self.backend.readable(on):
                if not on:
                    break
                carry = body(carry)
                continue
            # Reading the condition would wait for the device. Run on, keep the old carry once it is false,
            # and after each block read what the condition was a block ago, which has arrived by now.
            carry = self.backend.map(lambda new, old, on=on: where(on, new, old), body(carry), carry)
            if k % BLOCK == BLOCK - 1:
                if earlier is not None and not earlier():
                    break
                earlier = read_later(on)
        return carry

    def cond(self, pred: Any, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
        if self.backend.readable(pred):
            return yes() if pred else no()
        return self.backend.map(lambda x, y: where(pred, x, y), yes(), no())

    def set_row(self, items: Any, k: Any, item: Tree) -> Any:
        if not isinstance(k, Tensor):
            return super().set_row(items, k, item)

        # The index is on the device: every row is selected there.
        def row(i: int, old: Tree) -> Tree:
            return self.backend.map(lambda new, old: torch.where(k == i, new, old), item, old)

        return [row(i, old) for i, old in enumerate(items)]

    def take(self, items: Any, k: Any) -> Tree:
        if not isinstance(k, Tensor):
            return items[k]
        return self.backend.map(lambda *leaves: torch.stack(leaves).index_select(0, k.reshape(1))[0], *items)


def where(condition: Any, x: Any, y: Any) -> Any:
    """``torch.where`` that takes Python numbers everywhere, and a Python boolean as the condition."""
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)
