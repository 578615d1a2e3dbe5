"""The optimal schedule of checkpoints as plain data: what it costs, and that it can be carried out."""

import dataclasses
from functools import cache
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypergrad.errors import ArgumentError
from hypergrad.tapes.binomial import forward_steps, schedule
from hypergrad.tapes.revolve import Online, repeats

LONGEST, MOST = 200, 20
lengths, counts = st.integers(1, LONGEST), st.integers(1, MOST)


@cache
def optimum():
    """t[c, l]: fewest steps to advance so that l steps can be pulled back with c slots, one of them z_0's.

    t(l, c) = min_m m + t(m, c) + t(l − m, c − 1); with one slot every step is reached from z_0.
    """
    t = np.zeros((MOST + 1, LONGEST + 1), int)
    t[1] = [length * (length - 1) // 2 for length in range(LONGEST + 1)]
    for c in range(2, MOST + 1):
        for length in range(2, LONGEST + 1):
            m = np.arange(1, length)
            t[c, length] = np.min(m + t[c, m] + t[c - 1, length - m])
    return t


def closed_form(length, slots):
    """r l − C(s + r, s + 1), where C(s + r − 1, s) < l ≤ C(s + r, s) (Griewank and Walther 2000)."""
    r = 0
    while comb(slots + r, slots) < length:
        r += 1
    return r * length - comb(slots + r, slots + 1)


def carry_out(plan, length, slots, held=(0,)):
    """Do as the plan says with the number of a step for its state; return the steps advanced in all."""
    held, advanced, visited = dict(enumerate(held)), 0, []
    for step, slot, moves in plan.rounds:
        assert slot in held, f"step {step} starts from slot {slot}, which is empty"
        at = held[slot]
        for start, count, place in moves:
            assert start == at and count >= 1
            if place is not None:
                held[place] = at
            at += count
            advanced += count
        assert set(held) <= set(range(slots))
        assert at == step
        visited.append(step)
    assert visited == list(range(length))[::-1]
    return advanced


class TestCost:
    def test_the_closed_form_is_the_optimum(self):
        t = optimum()
        for slots in range(1, MOST + 1):
            found = [closed_form(length, slots) for length in range(1, LONGEST + 1)]
            assert found == t[slots, 1:].tolist()

    @pytest.mark.parametrize("slots", range(1, MOST + 1))
    def test_is_the_optimum(self, slots):
        found = [forward_steps(length, slots) for length in range(1, LONGEST + 1)]
        assert found == optimum()[slots, 1:].tolist()

    @pytest.mark.parametrize("slots", range(1, MOST + 1))
    def test_is_that_of_the_schedule(self, slots):
        plans = [schedule(length, slots) for length in range(1, LONGEST + 1)]
        assert [plan.forward_steps for plan in plans] == optimum()[slots, 1:].tolist()

    @pytest.mark.parametrize(
        "length, slots, steps",
        [(1, 1, 0), (1, 9, 0), (2, 1, 1), (2, 2, 1), (10, 3, 15), (10, 9, 9), (10, 10, 9), (50, 50, 49)],
    )
    def test_small_cases(self, length, slots, steps):
        assert forward_steps(length, slots) == schedule(length, slots).forward_steps == steps

    @given(st.integers(1, 10**6), st.integers(2, 1000))
    def test_of_long_runs(self, length, slots):
        assert forward_steps(length, slots) == closed_form(length, slots)


class TestSchedule:
    @given(lengths, counts)
    def test_can_be_carried_out(self, length, slots):
        plan = schedule(length, slots)
        total = sum(move.count for each in plan.rounds for move in each.moves)
        assert carry_out(plan, length, slots) == total == plan.forward_steps == closed_form(length, slots)

    @pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 20])
    def test_can_be_carried_out_with_any_slots(self, length):
        for slots in range(1, length + 3):
            assert carry_out(schedule(length, slots), length, slots) == closed_form(length, slots)

    @given(lengths, counts)
    def test_is_a_value(self, length, slots):
        plan, same = schedule(length, slots), schedule(length, slots)
        assert plan == same and hash(plan) == hash(same)
        assert schedule(length + 1, slots) != plan

    def test_is_frozen(self):
        plan = schedule(5, 2)
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.rounds = ()

    @given(lengths, counts)
    def test_numbers_are_pythons_own(self, length, slots):
        for step, slot, moves in schedule(length, slots).rounds:
            numbers = [step, slot, *(x for move in moves for x in move if x is not None)]
            assert {type(x) for x in numbers} == {int}

    def test_can_be_drawn(self):
        drawn = str(schedule(10, 3))
        assert len(drawn.splitlines()) >= 10 and "Round(" not in drawn
        assert drawn != str(schedule(10, 2))

    @pytest.mark.parametrize("length, slots", [(0, 1), (-1, 2), (5, 0), (5, -1)])
    def test_nonsense_is_refused(self, length, slots):
        for f in (forward_steps, schedule):
            with pytest.raises(ArgumentError):
                f(length, slots)


class TestOnline:  # where one does not know how long the run will be
    @staticmethod
    def after(length, slots):
        online = Online(slots)
        for step in range(length):
            online.visit(step)
            held = [start for start, _ in online.held]
            assert len(held) <= slots and held[0] == 0 and held == sorted(set(held)) and held[-1] <= step
        return online.schedule(length)

    @given(lengths, counts)
    def test_can_be_carried_out(self, length, slots):
        plan = self.after(length, slots)
        advanced = carry_out(plan, length, slots, plan.held)
        assert advanced == plan.forward_steps and length - 1 + advanced >= forward_steps(length, slots)

    def test_the_first_steps_by_hand(self):
        """Which states three slots hold after each step, and their levels, by the rule of the paper."""
        online, inf = Online(3), float("inf")
        expected = [
            [(0, inf)],
            [(0, inf), (1, 0)],
            [(0, inf), (1, 0), (2, 0)],
            [(0, inf), (1, 0), (3, 1)],  # none has a later one of a higher level: the newest, one level up
            [(0, inf), (3, 1), (4, 0)],
            [(0, inf), (3, 1), (5, 1)],
            [(0, inf), (3, 1), (6, 2)],
            [(0, inf), (6, 2), (7, 0)],
        ]
        for step, held in enumerate(expected):
            online.visit(step)
            assert online.held == held

    @given(lengths, counts)
    def test_runs_no_step_more_often_than_a_known_length_does(self, length, slots):
        plan, runs = self.after(length, slots), np.zeros(length, int)
        for move in (move for each in plan.rounds for move in each.moves):
            runs[move.start : move.start + move.count] += 1
        assert runs.max() <= repeats(length, slots)
