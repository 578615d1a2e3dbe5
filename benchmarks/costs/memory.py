"""Memory and cost of a differentiated training run against its length T, for each tape.

    python benchmarks/memory.py [--backend torch|jax|numpy] [--lengths 10 32 100 316 1000] [--width 384]
        [--batch 100] [--tapes Full States ...] [--out FILE.json] [--plot FILE.png]
    python benchmarks/memory.py --long [--steps 2000]

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
import ctypes
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import hypergrad as hg  # noqa: E402

IN, OUT, BATCHES, HYPERPARAMETERS, SLOTS = 784, 10, 10, 4, 20
RATE, MOMENTUM, BLOCK, RUNS = 0.01, 0.9, 20, 9
RULE = hg.SGD(RATE, momentum=MOMENTUM)
Program = Callable[[], Any]
NAN, MB, GB = float("nan"), 1e6, 1e9
LONG, MILLION, KEPT = 2000, 536, 100_000_000

# Targets of PERFORMANCE.md: FLOPs of a step in g, and copies of θ. The state z is θ and its velocity.
COST = {"Full": 3.0, "States": 4.05, "Reversible": 4.3, "Forward": 1 + 2 * HYPERPARAMETERS}
SLOPE = {"States": 1.05 * 2}
AT_1000 = {"Binomial": 5.6, "Reversible": 14.0}
FLAT, ABOVE = 1.02, 200 * MB


@dataclass(frozen=True)
class Case:
    """One run to differentiate. The clock takes ``seconds``, or one run if that is longer, or none for 0."""

    backend: str
    tape: str
    length: int
    width: int
    batch: int
    directory: str
    limit: float
    seconds: float
    counted: bool = True
    max_bytes: int | None = None
    donate: bool = False

    @property
    def estimator(self) -> Any:
        if self.tape == "Forward":
            return hg.Forward(RULE, self.length)
        return hg.Unrolled(RULE, self.length, tape=TAPES[self.tape](self))

    @property
    def cost(self) -> float | None:
        """What is asked of a step, in FLOPs."""
        if self.tape == "Binomial":
            return AT_1000["Binomial"] if self.length == 1000 else None
        return 3.8 if (self.tape, self.backend) == ("States", "jax") else COST.get(self.tape)


def binomial(case: Case) -> Any:
    return hg.Binomial(max_bytes=case.max_bytes) if case.max_bytes else hg.Binomial(slots=SLOTS)


TAPES: dict[str, Callable[[Case], Any]] = {
    "Full": lambda case: hg.Full(),
    "States": lambda case: hg.States(),
    "Offload": lambda case: hg.Offload(hg.States(), case.directory),
    "Binomial": binomial,
    "Reversible": lambda case: hg.Reversible(),
}
LABELS = {
    "Offload": "Offload(States) to a file",
    "Binomial": f"Binomial({SLOTS})",
    "Forward": f"Forward, {HYPERPARAMETERS} hyperparameters",
}


@dataclass(frozen=True)
class Seen:
    """What a run took: memory in bytes, cost in training gradients per step, and the estimate in seconds."""

    case: Case
    copy: int
    in_all: float
    over_a_step: float
    flops: float = NAN
    time: float = NAN
    seconds: float = NAN

    @property
    def copies(self) -> float:
        return self.in_all / self.copy


class Net(NamedTuple):
    """A framework's MLP, its losses and data."""

    inner: Callable[..., Any]
    outer: Callable[..., Any]
    gradient: Callable[[Any], Any]
    parameters: Callable[[int], dict[str, Any]]
    hparams: Any
    train: Callable[[Any], Any]
    val: Any

    @property
    def problem(self) -> Any:
        return hg.Bilevel(self.inner, self.outer)

    def step(self, params: dict[str, Any], velocity: dict[str, Any]) -> Any:
        """A training step as one would write it."""
        g = self.gradient(params)
        velocity = {name: MOMENTUM * v + g[name] for name, v in velocity.items()}
        return {name: p - RATE * velocity[name] for name, p in params.items()}, velocity


def torch_net(size: int) -> Net:
    import cost_torch as suite
    import torch

    # Memory does not depend on the threads, and two that wait for one core make the clock useless.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = suite.batch_of(BATCHES * size)
    hparams = torch.full((HYPERPARAMETERS,), -6.0)

    def train(t):
        place = int(t) % BATCHES * size
        return x[place : place + size], y[place : place + size]

    def gradient(params):
        variables = {name: p.detach().requires_grad_() for name, p in params.items()}
        found = torch.autograd.grad(suite.with_l2(variables, hparams, train(0)), list(variables.values()))
        return dict(zip(variables, found, strict=True))

    val = suite.batch_of(size)
    return Net(suite.with_l2, suite.outer, gradient, suite.parameters, hparams, train, val)


def jax_net(size: int) -> Net:
    import cost_jax as suite
    import jax
    from jax import lax

    data, hparams = suite.batch_of(BATCHES * size, 0), jax.numpy.full(HYPERPARAMETERS, -6.0)
    data = {"x": data["x"], "y": data["y"]}
    val = {name: leaf[:size] for name, leaf in suite.batch_of(size, 1).items() if name in data}

    def train(t):
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, t % BATCHES * size, size), data)

    def gradient(params):
        return jax.grad(suite.with_l2)(params, hparams, train(0))

    return Net(suite.with_l2, suite.outer, gradient, suite.parameters, hparams, train, val)


def numpy_net(size: int) -> Net:
    import autograd
    import autograd.numpy as np

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCHES * size, IN)), np.eye(OUT)[rng.integers(OUT, size=BATCHES * size)]
    hparams = np.full(HYPERPARAMETERS, -6.0)

    def parameters(width):
        sizes = [IN, width, width, width, OUT]
        pairs = list(zip(sizes, sizes[1:], strict=False))
        weights = {f"w{k}": rng.normal(size=(m, n)) / m**0.5 for k, (m, n) in enumerate(pairs)}
        return weights | {f"b{k}": np.zeros(n) for k, (_, n) in enumerate(pairs)}

    def train(t):
        place = int(t) % BATCHES * size
        return x[place : place + size], y[place : place + size]

    def outer(params, hparams, batch):
        z, labels = batch
        for k in range(4):
            z = np.dot(z, params[f"w{k}"]) + params[f"b{k}"]
            z = np.maximum(z, 0.0) if k < 3 else z
        high = np.max(z, axis=1, keepdims=True)
        logs = z - high - np.log(np.sum(np.exp(z - high), axis=1, keepdims=True))
        return -np.mean(np.sum(labels * logs, axis=1))

    def inner(params, hparams, batch):
        strengths = np.exp(hparams)
        return outer(params, hparams, batch) + sum(
            strengths[k] * np.sum(params[f"w{k}"] ** 2) for k in range(4)
        )

    slope = autograd.grad(inner)
    return Net(
        inner, outer, lambda params: slope(params, hparams, train(0)), parameters, hparams, train, train(1)
    )


NETS = {"torch": torch_net, "jax": jax_net, "numpy": numpy_net}


def measure(case: Case) -> Seen:
    """In a process of its own."""
    net = NETS[case.backend](case.batch)
    return compiled(case, net) if case.backend == "jax" else eager(case, net)


def eager(case: Case, net: Net) -> Seen:
    torch = case.backend == "torch"
    peak = Resident() if torch else Traced()
    # The framework's own memory: its threads, and the code of its kernels.
    small = net.parameters(8)
    net.step(small, {name: 0 * p for name, p in small.items()})
    estimate(replace(case, length=2), net, small)()
    nothing = peak()
    params = net.parameters(case.width)
    net.step(params, {name: 0 * p for name, p in params.items()})
    plain = peak()
    run = estimate(case, net, params)
    seconds = clock(run)
    most = peak()
    peak.stop()
    copy = sum(leaf.nbytes for leaf in params.values())
    seen = Seen(case, copy, most - nothing, most - plain, seconds=seconds)
    seen = timed(seen, lambda: [net.gradient(params) for _ in range(BLOCK)], run)
    if not torch or not case.counted:
        return seen
    from cost_torch import flops

    return replace(seen, flops=(flops(run) / flops(lambda: net.gradient(params)) - 1) / case.length)


def compiled(case: Case, net: Net) -> Seen:
    import jax

    params = net.parameters(case.width)
    velocity = {name: 0 * p for name, p in params.items()}
    state, run = case.estimator.init(net.problem, params, net.hparams), case.estimator.estimate

    def planned(program: Any) -> int:
        sizes = program.memory_analysis()
        given = sizes.argument_size_in_bytes - sizes.alias_size_in_bytes
        return given + sizes.output_size_in_bytes + sizes.temp_size_in_bytes

    step = jax.jit(net.step, donate_argnums=(0, 1) if case.donate else ())
    plain = planned(step.lower(params, velocity).compile())

    @partial(jax.jit, donate_argnums=(0,) if case.donate else ())
    def whole(state, hparams, val):
        return run(net.problem, state, hparams, net.train, val)

    args = state, net.hparams, net.val
    program = whole.lower(*args).compile()
    copy = sum(leaf.nbytes for leaf in params.values())
    seen = Seen(case, copy, planned(program), planned(program) - plain)
    if seen.in_all > case.limit:
        return seen
    gradient = jax.jit(net.gradient).lower(params).compile()
    block = [params] * BLOCK
    return timed(
        seen,
        lambda: jax.block_until_ready([gradient(params) for params in block][-1]),
        lambda: jax.block_until_ready(program(jax.tree.map(jax.numpy.copy, state), *args[1:])),
    )


def estimate(case: Case, net: Net, params: dict[str, Any]) -> Callable[[], Any]:
    estimator, problem = case.estimator, net.problem
    state = estimator.init(problem, params, net.hparams)
    return lambda: estimator.estimate(problem, state, net.hparams, net.train, net.val)


def timed(seen: Seen, unit: Program, run: Program) -> Seen:
    """Gradients and runs in turn."""
    case, units, runs = seen.case, [clock(unit) for _ in range(3)][1:], list[float]()
    while sum(runs) < case.seconds and len(runs) < RUNS:
        runs.append(clock(run))
        units.append(clock(unit))
    if not runs:
        return seen
    whole, g = statistics.median(runs), statistics.median(units) / BLOCK
    return replace(seen, time=(whole / g - 1) / case.length, seconds=whole)


def clock(program: Program) -> float:
    begin = time.perf_counter()
    program()
    return time.perf_counter() - begin


class Resident:
    """The largest that the process has been, in bytes, each large array giving back its pages when it goes.

    What glibc keeps for later, and breaks into pieces, was 7 % of a hundred states.
    """

    def __init__(self) -> None:
        self._limit(1 << 16, 1 << 16)

    def __call__(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def stop(self) -> None:
        # What glibc comes to by itself, with large arrays: programs are faster so.
        self._limit(1 << 25, 1 << 26)

    @staticmethod
    def _limit(mapped: int, trimmed: int) -> None:
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-3, mapped)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, trimmed)  # M_TRIM_THRESHOLD


class Traced:
    """The most that was allocated, as tracemalloc sees it, since the last time. That slows programs down."""

    def __init__(self) -> None:
        tracemalloc.start()

    def __call__(self) -> int:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return most

    def stop(self) -> None:
        tracemalloc.stop()


def processes(backend: str) -> ProcessPoolExecutor:
    """A fresh process for each case, the framework being loaded once."""
    context = multiprocessing.get_context("forkserver")
    # torch loads the last of these at the first gradient.
    context.set_forkserver_preload(
        ["autograd.numpy"]
        if backend == "numpy"
        else [f"cost_{backend}"] + ["torch.fx.experimental.symbolic_shapes"] * (backend == "torch")
    )
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)


def sweep(options: argparse.Namespace, directory: str) -> Iterator[Seen]:
    """All cases, those that are expected to take more than the limit left out."""
    with processes(options.backend) as pool:
        for tape in options.tapes:
            if (tape, options.backend) == ("Offload", "jax"):
                continue  # a compiled program reads no file
            before: list[Seen] = []
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
                seen = pool.submit(measure, case).result()
                show(seen, before)
                before.append(seen)
                yield seen


def expected(before: list[Seen], length: int) -> float:
    """Bytes that so many steps will take, by those of the lengths before."""
    if not before:
        return 0.0
    last = before[-1]
    slope = rise(last, before[-2]) if len(before) > 1 else last.in_all / last.case.length
    return last.in_all + slope * (length - last.case.length)


def rise(later: Seen, earlier: Seen) -> float:
    """Bytes a step."""
    return (later.in_all - earlier.in_all) / (later.case.length - earlier.case.length)


def header() -> None:
    print(
        f"{'':28}{'':>7}{'copies of θ':>14}{'over':>11}{'copies':>12}{'FLOPs':>16}{'time':>8}{'estimate':>10}"
    )
    print(f"{'tape':28}{'T':>7}{'in all':>9}{'':>5}{'a step':>11}{'a step':>12}{'g a step':>16}", end="")
    print(f"{'':>8}{'s':>10}")


def show(seen: Seen, before: list[Seen]) -> None:
    """One line, with what is asked of the numbers beside them."""
    case, slope = seen.case, rise(seen, before[-1]) / seen.copy if before else NAN
    whole = AT_1000["Reversible"] if (case.tape, case.length) == ("Reversible", 1000) else None
    if case.tape == "Forward" and before:
        whole = FLAT * before[0].copies
    print(
        f"{LABELS.get(case.tape, case.tape):28}{case.length:7}{seen.copies:9.2f}{asked(seen.copies, whole)}"
        f"{seen.over_a_step / seen.copy:9.2f}{slope:9.4f}{asked(slope, SLOPE.get(case.tape))}"
        f"{seen.flops:8.3f}{asked(seen.flops, case.cost)}{seen.time:8.3f}{seen.seconds:9.2f}",
        flush=True,
    )


def asked(value: float, target: float | None) -> str:
    return f"{'' if target is None else f' ≤ {target:.4g}' + ('✗' if value > target else ''):10}"


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
            seen = pool.submit(measure, case).result()
            name = f"Binomial(max_bytes={KEPT:,})" if tape == "Binomial" else tape
            print(
                f"{name:32} {seen.copy // 4:,} parameters: {seen.over_a_step / MB:7.1f}"
                f"{asked(seen.over_a_step / MB, ABOVE / MB)} in all {seen.in_all / MB:.1f}; "
                f"{seen.seconds:.0f} s",
                flush=True,
            )


def draw(rows: list[Seen], path: Path, title: str) -> None:
    """Memory against T, and time for a step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    memory, cost = figure.subplots(1, 2)
    for k, (tape, marker) in enumerate(zip([*TAPES, "Forward"], "osv^D*", strict=True)):
        seen = [row for row in rows if row.case.tape == tape]
        if not seen:
            continue
        style = {"color": f"C{k}", "marker": marker, "markersize": 5, "label": LABELS.get(tape, tape)}
        memory.loglog([row.case.length for row in seen], [row.copies for row in seen], **style)
        cost.semilogx([row.case.length for row in seen], [row.time for row in seen], **style)
    memory.set(xlabel="training steps T", ylabel="memory in all, copies of θ")
    cost.set(xlabel="training steps T", ylabel="time of a step, training gradients", ylim=(0, None))
    lengths = sorted({row.case.length for row in rows})
    for axes in (memory, cost):
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.grid(alpha=0.3)
    memory.yaxis.set_major_formatter("{x:g}")
    # Plain numbers between the powers of ten, and not at each of them.
    memory.yaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else ""))
    for axes in (memory.xaxis, cost.xaxis):
        axes.set_minor_formatter("")
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


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
        options.out.write_text(json.dumps({**about, "rows": kept}, indent=1) + "\n")
    if options.plot:
        title = f"MLP 784-{options.width}-{options.width}-{options.width}-10, batch {options.batch}"
        draw(rows, options.plot, f"{title}, {options.backend}")


if __name__ == "__main__":
    main()
