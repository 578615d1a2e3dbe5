"""Each private name of torch that the backend reads: what it is taken for is what it is."""

import ast
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import hypergrad_torch  # noqa: E402
from hypergrad_torch import private  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

FOLDER = Path(hypergrad_torch.__file__).parent


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


class TestValues:
    def test_are_symbolic_under_transformations_and_on_meta(self):
        seen = []
        torch.func.grad(lambda x: (seen.append(private.is_symbolic(x)), x.sum())[1])(torch.ones(2))
        assert seen == [True]
        assert private.is_symbolic(torch.ones(2, device="meta"))
        assert not private.is_symbolic(torch.ones(2))

    def test_can_be_read_later_if_there_are_any(self):
        flag = private.read_later(torch.tensor(True))
        assert flag.ready
        assert flag() is True
        assert private.read_later(torch.tensor(True, device="meta")) is None

    def test_of_many_tensors_are_added_at_once(self):
        x, y = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.full((3,), 2.0)]
        got = private.axpy_of_all(0.5, x, y)
        assert [r.tolist() for r in got] == [[0.5, 0.5], [2.5, 2.5, 2.5]]


class TestSaved:
    def test_bytes_count_each_storage_once(self):
        x = leaf(*range(10))
        y = x * x  # saves x twice
        assert private.saved_bytes(private.nodes_before([y.grad_fn])) == 10 * 8

    @pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
    def test_bytes_of_a_sparse_matrix_are_those_of_its_parts(self):
        values, rows, columns = torch.ones(3), torch.arange(4), torch.arange(3)
        as_rows = torch.sparse_csr_tensor(rows, columns, values)
        as_columns = torch.sparse_csc_tensor(rows, columns, values)
        pairs = torch.sparse_coo_tensor(torch.stack([columns, columns]), values)
        for sparse, size in ((as_rows, 3 * 4 + 7 * 8), (as_columns, 3 * 4 + 7 * 8), (pairs, 3 * 4 + 6 * 8)):
            parts = private._dense_parts(sparse)
            assert sum(part.untyped_storage().nbytes() for part in parts) == size

    def test_bytes_that_a_checkpoint_makes_again_are_not_held(self):
        y = checkpoint(lambda x: x.exp().sin(), leaf(1.0, 2.0), use_reentrant=False)
        assert private.saved_bytes({y.grad_fn}) == 0

    def test_options_of_an_operation(self):
        y = torch.div(leaf(1.0), 3.0, rounding_mode="floor")
        assert private.saved_as(y.grad_fn, "rounding_mode") == "floor"


class TestRecomputation:
    def test_names_what_the_block_reads(self):
        block, x = nn.Linear(2, 2).double(), leaf(1.0, 2.0)
        y = checkpoint(lambda f, x, gain: gain * f(x), block, x, gain=2.0, use_reentrant=False)
        found = next(filter(None, map(private.recomputation, private.nodes_before([y.grad_fn]))))
        function, options, *arguments = found.reads
        assert function(block, x, gain=1.0).shape == (2,)
        assert options == {"gain": 2.0}
        assert arguments[0] is block

    def test_of_what_is_saved_is_none(self):
        assert private.recomputation((leaf(1.0) ** 2).grad_fn) is None


class TestHooks:
    def test_of_a_tensor_in_their_order(self):
        x, first, second = leaf(1.0), (lambda g: 2 * g), (lambda g: g + 1)
        assert private.hooks_of(x) == []
        x.register_hook(first)
        private.hook_unwatched(x, second)
        x.sum().backward()
        assert x.grad.tolist() == [3.0]
        g = torch.ones(1)
        for hook in private.hooks_of(x):
            g = hook(g)
        assert g.tolist() == [3.0]

    def test_of_a_module_are_nodes_of_their_own(self):
        block = nn.Linear(1, 1)
        block.register_full_backward_hook(lambda module, given, got: None)
        kinds = {
            private.custom_function(type(node))
            for node in private.nodes_before([block(torch.ones(1)).grad_fn])
        }
        assert kinds == {None, private.HookFunction}

    @pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
    def test_of_an_optimizer(self, register):
        optimizer = torch.optim.SGD([leaf(1.0)], 0.1)
        assert not private.has_step_hooks(optimizer)
        getattr(optimizer, register)(lambda *args: None)
        assert private.has_step_hooks(optimizer)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Once(Cube):
    backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


class TestCustomFunctions:
    @pytest.mark.parametrize("custom, once", [(Cube, False), (Once, True)])
    def test_are_known_by_their_node(self, custom, once):
        found = private.custom_function(type(custom.apply(leaf(2.0)).grad_fn))
        assert found is custom
        assert private.once_differentiable(found) is once

    def test_those_of_torch_are_not_the_users(self):
        assert private.custom_function(type(leaf(2.0).exp().grad_fn)) is None


class TestModules:
    def test_hold_tensors_in_two_dictionaries_that_can_be_filled(self):
        block = nn.BatchNorm1d(2)
        params, buffers = private.slots_of(block)
        assert set(params) == {"weight", "bias"}
        assert set(buffers) == {"running_mean", "running_var", "num_batches_tracked"}
        params["weight"] = other = torch.ones(2)
        assert block.weight is other


def test_nodes_before_end_where_they_are_told_to():
    x = leaf(1.0)
    y = x.exp()
    z = y.sin().sum()
    assert {type(n).__name__ for n in private.nodes_before([z.grad_fn], {y.grad_fn})} == {
        "SumBackward0",
        "SinBackward0",
        "ExpBackward0",
    }


PUBLIC = {"_replace", "_asdict", "_fields"}


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_other_file_reads_a_private_name(path):
    if path.name == "private.py":
        return
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    read = {name for node in imports for name in (*node.module.split("."), *(x.name for x in node.names))}
    read |= {node.attr for node in attributes}
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in attributes if getattr(node.value, "id", "") in ("self", "cls")}
    own |= {getattr(node.target, "id", "") for node in nodes if isinstance(node, ast.AnnAssign)}
    assert [name for name in read - own - PUBLIC if name.startswith("_") and not name.startswith("__")] == []
