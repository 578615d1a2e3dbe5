"""Operations without a slope that torch has nodes for, where other frameworks compare."""

import pytest

import hypergrad as hg
from hypergrad import errors

torch = pytest.importorskip("torch")
from hypergrad_torch.slopes import FLAT, flat_inputs  # noqa: E402

parametrize = pytest.mark.parametrize


def warns(inner, lam=0.5):
    outer = lambda w, h, _: ((w - 2.0) ** 2).sum()  # noqa: E731
    w, lam = torch.ones(4, dtype=torch.float64), torch.tensor(lam, dtype=torch.float64)
    with pytest.warns(errors.ZeroResponseWarning):
        out = hg.hypergradient(hg.Bilevel(inner, outer), w, lam, None, None, hg.Greedy(hg.SGD(0.1)))
    assert out == 0.0


@parametrize(
    "activation",
    [
        torch.relu,
        torch.nn.functional.leaky_relu,
        torch.nn.functional.hardtanh,
        torch.nn.functional.softshrink,
        torch.abs,
        lambda x: x.clamp(min=0.2),
    ],
)
def test_a_margin_of_what_is_linear_in_pieces(activation):
    warns(lambda w, h, _: activation(w + h).sum() + (w**2).sum())


@parametrize(
    "step",
    [
        lambda h: torch.round(h, decimals=1),
        lambda h: torch.div(h, 0.3, rounding_mode="floor"),
        lambda h: torch.div(h, torch.tensor(0.3), rounding_mode="trunc"),
        lambda h: torch.normal(h, 0.1),
        lambda h: torch.bernoulli(h),
        lambda h: torch.poisson(h),
    ],
)
def test_a_step_or_a_draw(step):
    warns(lambda w, h, _: (w**2).sum() * (1.0 + step(h)))


def test_the_table_is_that_of_the_operators():
    x = torch.rand(3, 4, 8, 8, dtype=torch.float64).requires_grad_()
    nn = torch.nn.functional
    tried, missing = set(), set()
    for f in (
        torch.round, torch.floor, torch.ceil, torch.trunc, torch.sign, torch.sgn, torch.angle, torch.abs,
        torch.relu, nn.leaky_relu, nn.hardtanh, nn.hardshrink, nn.softshrink, torch.bernoulli, torch.poisson,
        lambda x: torch.round(x, decimals=1), lambda x: torch.normal(x, 0.1), lambda x: torch.normal(0.1, x),
        lambda x: torch.normal(x, x), lambda x: nn.max_pool2d(x, 2), lambda x: nn.max_pool3d(x, 2),
        lambda x: nn.adaptive_max_pool2d(x, 2), lambda x: nn.adaptive_max_pool3d(x, 2),
        lambda x: nn.fractional_max_pool2d(x, 2, output_size=3), lambda x: nn.rrelu(x, training=True),
        lambda x: nn.fractional_max_pool3d(x, 2, output_size=2),
        lambda x: torch.copysign(2.0 * x, x - 0.5), lambda x: torch.nextafter(2.0 * x, x),
        lambda x: (2.0 * x).bernoulli_(x), lambda x: (2.0 * x).bernoulli_(0.5),
    ):  # fmt: skip
        y = f(x).sum()
        try:
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
        except NotImplementedError:  # torch before 2.13 has no derivative of nextafter
            missing.add(y.grad_fn.next_functions[0][0].name())
            continue
        todo, nodes = [y.grad_fn, slope.grad_fn], set()
        while todo:
            if (node := todo.pop()) is None or node in nodes:
                continue
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
        for node in nodes:
            if flat := flat_inputs(node):
                tried.add(node.name())
                node.register_hook(
                    lambda inputs, _, flat=flat: [assert_zero(inputs[i]) for i in flat] and None
                )
        torch.autograd.grad(y + (slope.sum() if slope.requires_grad else 0.0), x, allow_unused=True)
    assert tried | missing == set(FLAT)


def assert_zero(g):
    assert g is None or not g.any()
