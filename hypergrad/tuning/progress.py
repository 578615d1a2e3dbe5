"""Progress of a long run, shown by rich where that is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from hypergrad.errors import MissingExtraError

Advance = Callable[[int, str], None]


def silent(count: int, note: str) -> None:
    """Show nothing."""


@contextmanager
def progress(title: str, total: int, show: bool | None = None) -> Iterator[Advance]:
    """Yield ``advance(count, note)``. By default the bar is shown on a terminal, if rich is installed.

    Raises:
        MissingExtraError: if ``show`` is true and rich is not installed.
    """
    installed = find_spec("rich") is not None
    if show and not installed:
        raise MissingExtraError(
            "showing progress needs rich: python -m pip install 'hypergradients[progress]'"
        )
    if not (installed and sys.stderr.isatty() if show is None else show):
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda count, note: bar.update(task, advance=count, note=note)
