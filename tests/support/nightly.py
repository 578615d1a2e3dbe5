"""How often drawn and repeated things are tried: a little by default, much with ``HYPERGRAD_NIGHTLY=1``."""

import os

NIGHTLY = os.environ.get("HYPERGRAD_NIGHTLY") == "1"


def rounds(by_day: int, by_night: int) -> int:
    """Return how many rounds to make."""
    return by_night if NIGHTLY else by_day
