"""Which mutants are tried: a random sample, stratified by folder."""

import ast
import random
from collections import defaultdict
from pathlib import Path

from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec, WorkerOutcome, WorkItem, WorkResult

FOLDERS = ("estimators", "solvers", "tapes", "updates", "tuning", "checks")


def modules(folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """Return the modules whose mutants are tried."""
    return sorted(path for folder in folders for path in Path("hypergrad", folder).rglob("*.py"))


def folder_of(item: WorkItem) -> str:
    """Return the folder of the module that it mutates."""
    return item.mutations[0].module_path.parts[1]


class Places:
    """Where a module can be mutated such that a test could notice it."""

    def __init__(self, module: Path) -> None:
        nodes = list(ast.walk(ast.parse(module.read_text())))
        self.never_executed = [place for node in nodes if (place := _never_executed(node)) is not None]
        self.binary = [(_end(node.left), _start(node.right)) for node in nodes if isinstance(node, ast.BinOp)]

    def hold(self, mutation: MutationSpec) -> bool:
        """Say whether the mutation is at such a place."""
        start, end = mutation.start_pos, mutation.end_pos
        if any(_start(node) <= start and end <= _end(node) for node in self.never_executed):
            return False
        # To cosmic-ray the stars of arguments are operators: what replaces them is no Python.
        if "BinaryOperator" in mutation.operator_name:
            return any(left <= start and end <= right for left, right in self.binary)
        return True


def _never_executed(node: ast.AST) -> ast.AST | None:
    """Return an annotation, which is a string here, or a block for the type checker alone."""
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return node
        case (
            ast.arg(annotation=ast.expr() as hint)
            | ast.AnnAssign(annotation=hint)
            | ast.FunctionDef(returns=ast.expr() as hint)
        ):
            return hint
    return None


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Return how many of ``count`` each stratum gets, in proportion to its size (largest remainders)."""
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()}
    given = {name: int(share) for name, share in exact.items()}
    short = sorted(exact, key=lambda name: given[name] - exact[name])[: count - sum(given.values())]
    return {name: given[name] + (name in short) for name in given}


def draw(work: WorkDB, count: int | None, seed: int) -> dict[str, int]:
    """Skip all mutants but ``count`` (``None``: all of them). Return how many each folder has."""
    places = {module: Places(module) for module in modules()}
    strata = defaultdict(list)
    for item in work.work_items:
        (mutation,) = item.mutations
        if places[mutation.module_path].hold(mutation):
            strata[folder_of(item)].append(item)
    sizes = {name: len(items) for name, items in strata.items()}
    if count is not None:
        chance = random.Random(seed)
        kept = {
            item.job_id
            for name, share in shares(sizes, count).items()
            for item in chance.sample(sorted(strata[name], key=_key), share)
        }
    else:
        kept = {item.job_id for items in strata.values() for item in items}
    left_out = [item.job_id for item in work.work_items if item.job_id not in kept]
    work.set_multiple_results(left_out, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    return sizes


def _key(item: WorkItem) -> tuple:
    """An order that does not hang on the random names of the items."""
    (mutation,) = item.mutations
    return str(mutation.module_path), mutation.operator_name, mutation.occurrence
