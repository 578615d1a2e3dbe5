"""The table of the runs, line by line, and the picture."""

from pathlib import Path

from benchmarks.costs.memory.case import AT_1000, FLAT, LABELS, NAN, SLOPE, TAPES, Measurement


def rise(later: Measurement, earlier: Measurement) -> float:
    """Bytes a step."""
    return (later.in_all - earlier.in_all) / (later.case.length - earlier.case.length)


def header() -> None:
    print(
        f"{'':28}{'':>7}{'copies of θ':>14}{'over':>11}{'copies':>12}{'FLOPs':>16}{'time':>8}{'estimate':>10}"
    )
    print(f"{'tape':28}{'T':>7}{'in all':>9}{'':>5}{'a step':>11}{'a step':>12}{'g a step':>16}", end="")
    print(f"{'':>8}{'s':>10}")


def show(measured: Measurement, before: list[Measurement]) -> None:
    """One line, with what is asked of the numbers beside them."""
    case, slope = measured.case, rise(measured, before[-1]) / measured.copy if before else NAN
    whole = AT_1000["Reversible"] if (case.tape, case.length) == ("Reversible", 1000) else None
    if case.tape == "Forward" and before:
        whole = FLAT * before[0].copies
    print(
        f"{LABELS.get(case.tape, case.tape):28}{case.length:7}"
        f"{measured.copies:9.2f}{asked(measured.copies, whole)}"
        f"{measured.over_a_step / measured.copy:9.2f}{slope:9.4f}{asked(slope, SLOPE.get(case.tape))}"
        f"{measured.flops:8.3f}{asked(measured.flops, case.cost)}{measured.time:8.3f}{measured.seconds:9.2f}",
        flush=True,
    )


def asked(value: float, target: float | None) -> str:
    return f"{'' if target is None else f' ≤ {target:.4g}' + ('✗' if value > target else ''):10}"


def draw(rows: list[Measurement], path: Path, title: str) -> None:
    """Memory against T, and time for a step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    memory, cost = figure.subplots(1, 2)
    for k, (tape, marker) in enumerate(zip([*TAPES, "Forward"], "osv^D*", strict=True)):
        measured = [row for row in rows if row.case.tape == tape]
        if not measured:
            continue
        style = {"color": f"C{k}", "marker": marker, "markersize": 5, "label": LABELS.get(tape, tape)}
        memory.loglog([row.case.length for row in measured], [row.copies for row in measured], **style)
        cost.semilogx([row.case.length for row in measured], [row.time for row in measured], **style)
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
