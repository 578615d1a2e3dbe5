"""Memory and cost of a differentiated training run against its length T, for each tape.

    python -m benchmarks.costs.memory [--backend torch|jax|numpy] [--lengths 10 32 100 316 1000] [--width 384]
        [--batch 100] [--tapes Full States ...] [--out FILE.json] [--plot FILE.png]
    python -m benchmarks.costs.memory --long [--steps 2000]

An MLP 784-3×width-10 with ReLU, one L2 strength for each layer, momentum SGD; batches are slices of a data
set, found anew by t -> batch. Memory is in copies of θ, 32-bit in torch and JAX, 64-bit in NumPy:

    torch   the peak of the resident set, each run in a fresh process
    JAX     arguments, results and temporary memory of the compiled estimate, as XLA plans it; with --donate
            the state is handed over, and results may take its place
    NumPy   the peak of what tracemalloc sees

"In all" counts the parameters, the optimiser's state and one batch's activations too: in torch it is what
comes on top of a training step of a net of width 8. "Over a step" is what the estimate adds to the peak of a
plain training step of the same net, and the slope is between one length and the next. The unit of cost g is
one training gradient, as in cost.py: FLOPs are torch's count of matrix products, time is a ratio of
interleaved medians. What would take more than --limit is passed over. ``--long`` differentiates 2,000 steps
of a torch net of 10⁶ parameters, and says how far above a plain training step the process went.
"""

import argparse
import multiprocessing
import platform
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.costs.memory.case import ABOVE, LABELS, MB, TAPES, Case, Measurement
from benchmarks.costs.memory.measure import measure
from benchmarks.costs.memory.nets import NETS
from benchmarks.costs.memory.report import asked, draw, header, rise, show
from benchmarks.shared.report import save

GB = 1e9
LONG, MILLION, KEPT = 2000, 536, 100_000_000
"""Of the long run: its steps, the width at which the net has 10⁶ parameters, and bytes of checkpoints."""


def processes(backend: str) -> ProcessPoolExecutor:
    """A fresh process for each case, the framework being loaded once."""
    context = multiprocessing.get_context("forkserver")
    # torch loads the last of these at the first gradient.
    context.set_forkserver_preload(
        ["autograd.numpy"]
        if backend == "numpy"
        else [f"benchmarks.costs.nets.in_{backend}"]
        + ["torch.fx.experimental.symbolic_shapes"] * (backend == "torch")
    )
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)


def sweep(options: argparse.Namespace, directory: str) -> Iterator[Measurement]:
    """All cases, those that are expected to take more than the limit left out."""
    with processes(options.backend) as pool:
        for tape in options.tapes:
            if (tape, options.backend) == ("Offload", "jax"):
                continue  # a compiled program reads no file
            before: list[Measurement] = []
            for length in sorted(options.lengths):
                case = Case(
                    options.backend,
                    tape,
                    length,
                    options.width,
                    options.batch,
                    directory,
                    options.limit * GB,
                    options.seconds,
                    counted=tape != "Offload",  # as States
                    donate=options.donate,
                )
                if options.backend != "jax" and (most := expected(before, length)) > case.limit:
                    print(f"{LABELS.get(tape, tape):28}{length:7} would take {most / GB:.1f} GB", flush=True)
                    continue
                measured = pool.submit(measure, case).result()
                show(measured, before)
                before.append(measured)
                yield measured


def expected(before: list[Measurement], length: int) -> float:
    """Bytes that so many steps will take, by those of the lengths before."""
    if not before:
        return 0.0
    last = before[-1]
    slope = rise(last, before[-2]) if len(before) > 1 else last.in_all / last.case.length
    return last.in_all + slope * (length - last.case.length)


def long(options: argparse.Namespace, directory: str) -> None:
    """The tapes that need little memory on a long run."""
    print(f"{options.steps} steps of a torch net, batch {options.batch}, MB over a plain training step:")
    with processes("torch") as pool:
        for tape in ("Reversible", "Binomial"):
            case = Case(
                "torch",
                tape,
                options.steps,
                MILLION,
                options.batch,
                directory,
                options.limit * GB,
                0.0,
                counted=False,
                max_bytes=KEPT if tape == "Binomial" else None,
            )
            measured = pool.submit(measure, case).result()
            name = f"Binomial(max_bytes={KEPT:,})" if tape == "Binomial" else tape
            print(
                f"{name:32} {measured.copy // 4:,} parameters: {measured.over_a_step / MB:7.1f}"
                f"{asked(measured.over_a_step / MB, ABOVE / MB)} in all {measured.in_all / MB:.1f}; "
                f"{measured.seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=NETS, default="torch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 32, 100, 316, 1000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--tapes", nargs="+", choices=[*TAPES, "Forward"], default=[*TAPES, "Forward"])
    parser.add_argument("--limit", type=float, default=6.0, help="GB that a run may take")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the clock, each")
    parser.add_argument("--directory", help="for the files of Offload; a temporary one by default")
    parser.add_argument("--donate", action="store_true", help="hand the state over, in JAX")
    parser.add_argument("--long", action="store_true", help="the long run of a large torch net, instead")
    parser.add_argument("--steps", type=int, default=LONG, help="of the long run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        if options.long:
            return long(options, directory)
        about = {name: getattr(options, name) for name in ("backend", "width", "batch")}
        about |= {"machine": platform.machine(), options.backend: version(options.backend)}
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        header()
        rows = list(sweep(options, directory))
    if options.out:
        kept = [{**asdict(row), "copies": row.copies} for row in rows]
        save(options.out, {**about, "rows": kept})
    if options.plot:
        title = f"MLP 784-{options.width}-{options.width}-{options.width}-10, batch {options.batch}"
        draw(rows, options.plot, f"{title}, {options.backend}")


if __name__ == "__main__":
    main()
