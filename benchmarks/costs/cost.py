"""What a hypergradient costs, in training gradients: FLOPs, interleaved time and memory against targets.

    python -m benchmarks.costs.cost --backend torch|jax [--width 1000] [--batch 100] [--compiled]
        [--out FILE.json]

The unit g is one training gradient, forward and backward, of the same loss on the same batch in the same
process. FLOPs repeat to the digit: torch's are those of matrix products, JAX's are what XLA counts of the
compiled program, elementwise work included. Times are ratios of medians, each
round measuring the baseline and all candidates in an order of its own. Use widths of 384 and more: smaller
nets measure the interpreter. The net is an MLP 784-3×width-10 with ReLU.
"""

import argparse
import platform
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.costs.row import Measured, measure
from benchmarks.shared.report import save


def show(results: list[Measured]) -> None:
    def against(value: float, target: float | None) -> str:
        mark = "" if target is None else f" ≤ {target:<5.4g}" + (" " if value <= target else "✗")
        return f"{value:8.3f}{mark:9}"

    print(f"{'':76} {'FLOPs':>8} {'target':8} {'time':>8} {'target':8}")
    for result in results:
        row, time = result.row, against(result.seconds, result.row.seconds)
        print(f"{row.name:76} {against(result.flops, row.flops)} {time}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--compiled", action="store_true", help="compiled estimates too: a minute each to make"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    suite = import_module(f"benchmarks.costs.cost_{options.backend}")
    net = import_module(f"benchmarks.costs.nets.in_{options.backend}")
    rows = suite.rows(options.width, options.batch, options.compiled)
    rows = [row for row in rows if options.only in row.name]
    about = {"backend": options.backend, "width": options.width, "batch": options.batch}
    about |= {"machine": platform.machine(), "versions": net.versions()}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = measure(rows, net, options.repeats)
    show(results)
    figures = [] if options.only else getattr(suite, "figures", lambda *_: [])(options.width, options.batch)
    for figure in figures:
        print(figure)
    if options.out:
        kept = {**about, "rows": [r.as_dict() for r in results], "figures": [asdict(f) for f in figures]}
        save(options.out, kept)


if __name__ == "__main__":
    main()
