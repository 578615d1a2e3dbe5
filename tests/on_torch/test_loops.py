"""Loops whose condition lies on a device that nobody waits for."""

from types import SimpleNamespace

import pytest
import torch
from hypergrad_torch import TorchBackend
from hypergrad_torch.loops import BLOCK, TorchLoops


class Far(TorchLoops):
    """Loops on values that nobody can read at once, though they are there."""

    def __init__(self):
        super().__init__(SimpleNamespace(readable=lambda *xs: False, map=TorchBackend().map))


@pytest.mark.parametrize("needed", [0, 7, 10, 23])
def test_a_condition_is_read_one_block_late(needed):
    rounds = 0

    def body(carry):
        nonlocal rounds
        rounds += 1
        return carry + 1

    end = Far().while_loop(lambda carry: carry < needed, body, torch.tensor(0), 1000)
    assert int(end) == needed
    assert needed <= rounds <= needed + 2 * BLOCK


def test_the_limit_holds():
    end = Far().while_loop(lambda carry: carry < 100, lambda carry: carry + 1, torch.tensor(0), 33)
    assert int(end) == 33


def test_without_a_value_it_runs_to_the_limit():
    end = TorchBackend().while_loop(
        lambda carry: carry < 1, lambda carry: carry + 1, torch.zeros((), device="meta"), 25
    )
    assert end.is_meta


@pytest.mark.parametrize("flag", [True, False])
def test_a_branch_takes_both_ways_and_selects(flag):
    found = Far().cond(torch.tensor(flag), lambda: {"x": torch.tensor(1.0)}, lambda: {"x": torch.tensor(2.0)})
    assert float(found["x"]) == (1.0 if flag else 2.0)
