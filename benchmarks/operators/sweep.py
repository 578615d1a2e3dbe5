"""Which operators of torch have a wrong second derivative, or two formulas for the first one?

Every operator that torch itself tests is given its own samples in float64. For each

* the second derivative by double backward is compared with differences of the gradient, along one random
  direction: ``wrong`` are those that differ without an error. Where the gradient is not the derivative
  of the value either, by rounding, by convention or at a jump, they are ``other``;
* the gradient with a graph is compared with the one without, bit for bit: ``two_formulas`` are those that
  differ. There `hypergrad_torch.ModuleTuner` computes the user's own gradient once more.

    python -m benchmarks.operators.sweep --out benchmarks/operators/torch.json

needs ``pip install expecttest`` beside torch, whose operator list imports it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEP = 1e-6
TOLERANCE = 1e-4
SAMPLES = 40


class Findings(NamedTuple):
    """The names of operators, by what was found."""

    right: list[str]
    wrong: dict[str, list[str]]
    other: dict[str, list[str]]
    two_formulas: dict[str, list[str]]
    refused: list[str]
    untried: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the findings as JSON")
    parser.add_argument("--only", default="", help="operators whose name matches this expression")
    args = parser.parse_args()
    found = sweep(re.compile(args.only))
    print(f"{len(found.right)} operators are right, {len(found.wrong)} wrong without an error:")
    for name, nodes in found.wrong.items():
        print(f"    {name}: {', '.join(nodes)}")
    print(f"{len(found.other)} whose gradient is not the derivative of the value, in some sample:")
    print("    " + ", ".join(found.other))
    print(f"{len(found.two_formulas)} have two formulas for their gradient:")
    for name, nodes in found.two_formulas.items():
        print(f"    {name}: {', '.join(nodes)}")
    print(f"{len(found.refused)} raise an error, {len(found.untried)} have no sample with a derivative")
    if args.out:
        text = {"torch": torch.__version__, **found._asdict()}
        args.out.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")


def sweep(only: re.Pattern[str]) -> Findings:
    """Try every operator whose name matches."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = Findings([], {}, {}, {}, [], [])
    for op in op_db:
        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
        if only.search(name) and torch.float64 in op.dtypes and op.supports_autograd:
            judge(name, op, found)
    return found


def judge(name: str, op: Any, found: Findings) -> None:
    """Try the samples of one operator, and put its name where it belongs."""
    wrong, other, twice, verdicts = set[str](), set[str](), set[str](), set[str]()
    for f, leaves in samples(op):
        try:
            verdict, nodes = second_derivative(f, leaves)
            verdicts.add(verdict)
            wrong |= nodes if verdict == "wrong" else set()
            other |= nodes if verdict == "other" else set()
            if not same_bits(f, leaves):
                twice |= nodes or {"?"}
        except Exception:
            verdicts.add("refused")
    if twice:
        found.two_formulas[name] = sorted(twice)
    if wrong:
        found.wrong[name] = sorted(wrong)
    elif other:
        found.other[name] = sorted(other)
    elif "right" in verdicts:
        found.right.append(name)
    else:
        (found.refused if "refused" in verdicts else found.untried).append(name)


def samples(op: Any) -> Iterator[tuple[Callable[[list[Tensor]], list[Tensor]], list[Tensor]]]:
    """Functions from the floating-point tensors of a sample to those of the result, and their arguments."""
    try:
        given = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    except Exception:
        return
    # Spread over the list, which goes from the plain call to the rarest options.
    for sample in given[:: max(1, len(given) // SAMPLES)][:SAMPLES]:
        call = (sample.input, *sample.args), sample.kwargs
        flat, tree = torch.utils._pytree.tree_flatten(call)
        places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]

        def f(leaves: list[Tensor], flat: Any = flat, tree: Any = tree, places: Any = places) -> list[Tensor]:
            filled = list(flat)
            for i, leaf in zip(places, leaves, strict=True):
                filled[i] = leaf.clone()  # some operators write into their argument
            args, kwargs = torch.utils._pytree.tree_unflatten(filled, tree)
            torch.manual_seed(0)
            out = torch.utils._pytree.tree_leaves(op(*args, **kwargs))
            return [x for x in out if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]

        if places and sum(flat[i].numel() for i in places) < 10_000:
            yield f, [flat[i].detach() for i in places]


class Evaluated(NamedTuple):
    """A value, its gradient by the inputs, and the results of the operator."""

    value: float
    gradients: list[Tensor]
    inputs: list[Tensor]
    results: list[Tensor]


def gradient(f: Callable[[list[Tensor]], list[Tensor]], leaves: list[Tensor], graph: bool) -> Evaluated:
    """Evaluate a random smooth function of the results, and its gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in leaves]
    results = f(inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in results]
    value = sum((u * y).sum() + 0.1 * (u * y).sum() ** 2 for u, y in zip(weights, results, strict=True))
    found = torch.autograd.grad(value, inputs, create_graph=graph, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    return Evaluated(float(value), gradients, inputs, results)


def second_derivative(
    f: Callable[[list[Tensor]], list[Tensor]], leaves: list[Tensor]
) -> tuple[str, set[str]]:
    """Is the second derivative right, wrong, or flat, and by which nodes?"""
    generator = torch.Generator().manual_seed(2)
    d, u = (
        [symmetric(torch.randn(x.shape, generator=generator, dtype=x.dtype)) for x in leaves] for _ in "du"
    )
    _, gradients, inputs, results = gradient(f, leaves, graph=True)
    total = sum((a * g).sum() for a, g in zip(u, gradients, strict=True))
    analytic = 0.0
    if total.requires_grad:
        pulled = torch.autograd.grad(total, inputs, allow_unused=True)
        analytic = sum(float((a * g).sum()) for a, g in zip(d, pulled, strict=True) if g is not None)

    def moved(step: float) -> tuple[float, float]:
        at = gradient(f, [x + step * a for x, a in zip(leaves, d, strict=True)], graph=False)
        return at.value, sum(float((a * g).sum()) for a, g in zip(u, at.gradients, strict=True))

    near, far = ((moved(h), moved(-h), 2 * h) for h in (STEP, 4 * STEP))
    first = sum(float((a * g).sum()) for a, g in zip(d, gradients, strict=True))
    for k, exact, verdict in ((0, first, "other"), (1, analytic, "wrong")):
        fine, coarse = ((up[k] - down[k]) / width for up, down, width in (near, far))
        if not (math.isfinite(exact) and math.isfinite(fine) and math.isfinite(coarse)):
            return "untried", set()
        noise = 30 * abs(fine - coarse) + 1e-7
        if abs(exact - fine) > TOLERANCE * max(abs(exact), abs(fine)) + noise:
            return verdict, nodes_of(results)
    return "right", nodes_of(results)


def symmetric(x: Tensor) -> Tensor:
    """Square matrices as symmetric ones: operators of those read one triangle alone."""
    return x + x.mT if x.ndim > 1 and x.shape[-1] == x.shape[-2] else x


def same_bits(f: Callable[[list[Tensor]], list[Tensor]], leaves: list[Tensor]) -> bool:
    """Is the gradient with a graph the one without, bit for bit?"""
    with_graph, without = (gradient(f, leaves, graph=graph).gradients for graph in (True, False))
    return all(
        torch.equal(a.detach().nan_to_num(), b.nan_to_num()) for a, b in zip(with_graph, without, strict=True)
    )


def nodes_of(results: list[Tensor]) -> set[str]:
    """The names of the nodes by which the results were made, except for those of the copies."""
    todo, seen = [y.grad_fn for y in results], set[Any]()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return {node.name() for node in seen} - {"torch::autograd::AccumulateGrad", "CloneBackward0"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
