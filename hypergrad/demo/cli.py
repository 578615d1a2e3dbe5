"""The command line: ``hypergrad compare`` and ``hypergrad backends``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hypergrad.backend import available, get_backend
from hypergrad.errors import HypergradError, MissingExtraError
from hypergrad.tuning.progress import progress

if TYPE_CHECKING:
    from hypergrad.demo import Comparison


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code: 0, or 2 with one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        return _backends() if arguments.command == "backends" else _compare(arguments)
    except (HypergradError, OSError) as error:
        print(f"hypergrad: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hypergrad", description="Hypergradients of training.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|backends")
    compare = commands.add_parser(
        "compare", help="compare estimators on real data, on equal budgets", allow_abbrev=False
    )
    compare.add_argument("--backend", default="numpy", help="which arrays to use (default: numpy)")
    compare.add_argument("--data", default="digits", help="digits, breast-cancer or wine (default: digits)")
    compare.add_argument("--seed", type=_natural, default=0, help="seed of split, network and batches")
    compare.add_argument(
        "--steps", type=_positive, default=2400, help="training gradients for each method (default: 2400)"
    )
    compare.add_argument(
        "--out", type=Path, default=Path("hypergrad-compare"), help="folder for picture and JSON"
    )
    compare.add_argument("--quiet", action="store_true", help="write the files and print nothing")
    commands.add_parser("backends", help="list backends, and how to install the missing ones")
    return parser


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number ≥ 0")
    return int(text)


def _positive(text: str) -> int:
    if _natural(text) < 1:
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return int(text)


def _backends() -> int:
    for row in available():
        print(f"{row.name:10s} " + ("installed" if row.installed else f"missing: {row.install}"))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    _require("matplotlib", "rich", "sklearn")
    from hypergrad.demo.compare import compare, stages
    from hypergrad.demo.data import load
    from hypergrad.demo.plot import plot_comparison

    backend, data = get_backend(arguments.backend), load(arguments.data, arguments.seed)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass  # if nothing can be written, fail before the work and not after it
    grid = 6
    show = False if arguments.quiet else None
    with progress("comparing", stages(grid), show) as advance:

        def notify(stage: str) -> None:
            advance(1, stage)
            if not arguments.quiet and not sys.stderr.isatty():
                print(f"… {stage}", file=sys.stderr, flush=True)

        result = compare(backend, data, arguments.seed, arguments.steps, grid, notify)
    result.save(out / "comparison.json")
    plot_comparison(result, out / "comparison.png")
    if not arguments.quiet:
        _print_table(result)
        print(f"Wrote {out / 'comparison.png'} and {out / 'comparison.json'}")
    return 0


def _require(*modules: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        raise MissingExtraError(
            f"hypergrad compare needs {', '.join(missing)}: python -m pip install 'hypergradients[demo]'"
        )


def _print_table(result: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result.data}: {result.budget} training gradients for each method",
        caption="first hypergradient: against central differences of 50 real training steps",
    )
    headings = (
        "method",
        "noise",
        "log L2",
        "T2 loss",
        "test error",
        "cost",
        "memory",
        "cosine",
        "rel. error",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in result.contestants:
        first = ["–" if number is None else f"{number:.3g}" for number in (row.cosine, row.relative_error)]
        table.add_row(
            row.name,
            f"{row.hparams['noise']:.2f}",
            " ".join(f"{strength:.1f}" for strength in row.hparams["log_l2"]),
            f"{row.val_loss:.3f}",
            f"{100 * row.test_error:.1f} %",
            f"{row.cost:.0f} g",
            f"{row.bytes_held / 2**20:.1f} MiB" if row.bytes_held else "–",
            *first,
        )
    wide = os.environ.get("COLUMNS") is None and not sys.stdout.isatty()
    Console(width=120 if wide else None).print(table)


if __name__ == "__main__":
    sys.exit(main())
