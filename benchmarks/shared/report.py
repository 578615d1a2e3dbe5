"""Results as tables for the eye, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def show(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], width: int, below: str = ""
) -> None:
    """Print a table whose first column has names, and the others numbers; and words below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=width)
    console.print(table)
    if below:
        console.print(below)


def save(path: Path, results: Any) -> None:
    """Write JSON, into a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def plain(tree: Any) -> Any:
    """Without what JSON has no word for: None for a number that is not finite."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
