"""What to install for the tests, with the oldest or the newest releases: ``requirements.py oldest|newest``.

The one list of minimums is pyproject.toml. Of the frameworks and of what the core depends on, ``oldest``
takes the declared minimum, and ``newest`` the newest release that pip finds. What else the tests need is as
declared.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__, "../../pyproject.toml").resolve().read_text())["project"]
extras = project["optional-dependencies"]
minimums = dict(line.split(">=") for line in (*project["dependencies"], *extras["torch"], *extras["jax"]))


def lines(which: str) -> list[str]:
    """Return the requirements, one a line."""
    name = lambda line: re.match(r"[\w-]+", line)[0]  # noqa: E731
    others = [line for line in extras["test"] if name(line) not in minimums]
    return [*(f"{k}=={v}" if which == "oldest" else k for k, v in minimums.items()), *others]


if __name__ == "__main__":
    print(*lines(sys.argv[1]), sep="\n")
