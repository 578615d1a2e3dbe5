"""Tapes are values, and refuse what makes no sense at once."""

import dataclasses

import pytest
from support.tapes import HEAVY, TAPES, VERIFIED

import hypergrad as hg
from hypergrad.errors import ArgumentError

parametrize = pytest.mark.parametrize


class TestValues:
    @parametrize("tape", [*TAPES.values(), *VERIFIED.values()], ids=repr)
    def test_are_frozen_comparable_and_printable(self, tape):
        assert tape == dataclasses.replace(tape) and hash(tape) == hash(dataclasses.replace(tape))
        assert type(tape).__name__ in repr(tape) and tape != hg.Full()
        for field in dataclasses.fields(tape):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(tape, field.name, None)

    NONSENSE = {
        "neither slots nor bytes": lambda: hg.Binomial(),
        "slots and bytes": lambda: hg.Binomial(slots=2, max_bytes=1000),
        "no slots": lambda: hg.Binomial(slots=0),
        "half a slot": lambda: hg.Binomial(slots=1.5),
        "a boolean slot": lambda: hg.Binomial(slots=True),
        "no bytes": lambda: hg.Binomial(max_bytes=0),
        "negative bytes": lambda: hg.Binomial(max_bytes=-1),
        "no bits": lambda: hg.Reversible(fraction=0),
        "half a bit": lambda: hg.Reversible(fraction=20.5),
        "no steps": lambda: hg.Unrolled(HEAVY, 0),
        "a start that is none": lambda: hg.Unrolled(HEAVY, 3, start=1.0),
    }

    @parametrize("build", NONSENSE.values(), ids=NONSENSE)
    def test_refuse_nonsense(self, build):
        with pytest.raises(ArgumentError):
            build()
