"""Random modules: each hypergradient is right, or is refused for something that stands in the module.

``HYPERGRAD_NIGHTLY=1 python -m pytest tests/on_torch/test_random_modules.py -s`` tries 1250 programs,
each in both APIs, and prints what was right and what was refused.
"""

from collections import Counter
from typing import NamedTuple

import pytest

import hypergrad as hg
from hypergrad import errors

torch = pytest.importorskip("torch")
from hypergrad_torch import ModuleTuner  # noqa: E402
from support.nightly import rounds  # noqa: E402
from support.random_modules import program  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

PROGRAMS = rounds(60, 1250)
RATE, MOMENTUM = 0.05, 0.9
_draw = torch.Generator().manual_seed(3)
X, XV = (torch.randn(n, 3, generator=_draw, dtype=torch.float64) for n in (8, 6))


class Arithmetic(NamedTuple):
    """The dtype of a program, whether it runs under autocast, and how near two ways of computing come."""

    dtype: torch.dtype
    autocast: bool
    rtol: float

    def data(self):
        return [(x.to(self.dtype), x.sin().sum(1).to(self.dtype)) for x in (X, XV)]

    def lam(self):
        return torch.tensor(-2.0, dtype=self.dtype)

    def mode(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


ARITHMETIC = [
    Arithmetic(torch.float64, False, 1e-7),
    Arithmetic(torch.float32, False, 2e-3),
    Arithmetic(torch.float64, False, 1e-7),
    Arithmetic(torch.float32, True, 0.1),
]
"""In turn."""
ESTIMATORS = {
    "greedy": (1, lambda rule: hg.Greedy(rule)),
    "full": (3, lambda rule: hg.Unrolled(rule, 3)),
    "states": (3, lambda rule: hg.Unrolled(rule, 3, tape=hg.States())),
    "binomial": (4, lambda rule: hg.Unrolled(rule, 4, tape=hg.Binomial(2))),
}


def judged(module, hparams, batch):
    return ((module(batch[0]).squeeze(-1) - batch[1]) ** 2).mean()


def trained(module, hparams, batch):
    """The penalty grows with the output too, so that λ acts through every part of the module."""
    out = module(batch[0]).squeeze(-1)
    penalty = sum((p**2).sum() for p in module.parameters() if p.requires_grad)
    return ((out - batch[1]) ** 2).mean() + hparams["l2"].exp() * (penalty + (out**2).mean())


def split(module):
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return params, {name: b.clone() for name, b in module.named_buffers()}


class Called(nn.Module):
    """What a loss is to a module that `functional_call` fills."""

    def __init__(self, module, loss):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, hparams, batch):
        return self.loss(self.module, hparams, batch)


def of(module, loss):
    """The loss as a function: (params, hparams, batch, buffers) -> value, buffers."""
    called = Called(module, loss)

    def run(params, hparams, batch, buffers):
        buffers = {name: b.clone() for name, b in buffers.items()}
        given = {f"module.{name}": x for name, x in {**params, **buffers}.items()}
        value = functional_call(called, given, (hparams, batch))
        return value, buffers

    return run


def by_hand(seed, steps, how):
    """dC2/dλ of training with momentum, by one double backward pass through the plain module."""
    module, (train, val) = program(seed, plain=True)[0].to(how.dtype), how.data()
    inner, outer = of(module, trained), of(module, judged)
    params, buffers = split(module)
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    lam, speed = how.lam().requires_grad_(), {name: torch.zeros_like(p) for name, p in params.items()}
    torch.manual_seed(seed)
    for _ in range(steps):
        with how.mode():
            value, buffers = inner(params, {"l2": lam}, train, buffers)
        buffers = {name: b.detach() for name, b in buffers.items()}
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=True, allow_unused=True)
        for name, g in zip(params, gradients, strict=True):
            speed[name] = MOMENTUM * speed[name] + (0.0 if g is None else g)
        params = {name: p - RATE * speed[name] for name, p in params.items()}
    with how.mode():
        value, _ = outer(params, None, val, buffers)
    return torch.autograd.grad(value, lam)[0]


def by_functions(seed, steps, estimator, how):
    module, suspects = program(seed, plain=False)
    module, (train, val) = module.to(how.dtype), how.data()
    params, buffers = split(module)
    inner, outer = of(module, trained), of(module, judged)
    problem = hg.Bilevel(inner, lambda p, h, b, aux: outer(p, h, b, aux)[0], has_aux=True)
    rule = hg.SGD(RATE, momentum=MOMENTUM)
    given = {name: p.detach().clone() for name, p in params.items()}
    torch.manual_seed(seed)
    with how.mode():
        found = hg.hypergradient(
            problem, given, {"l2": how.lam()}, lambda t: train, val, estimator(rule), aux=buffers
        )
    return found["l2"], suspects


def by_a_tuner(seed, steps, estimator, how):
    module, suspects = program(seed, plain=False)
    module, (train, val) = module.to(how.dtype), how.data()
    optimizer = torch.optim.SGD(split(module)[0].values(), RATE, momentum=MOMENTUM)
    tuner = ModuleTuner(
        module, optimizer, {"l2": how.lam()}, inner=trained, outer=judged,
        estimator=estimator(optimizer), every=steps, hyper_update=hg.SGD(0.0),
    )  # fmt: skip
    torch.manual_seed(seed)
    for _ in range(steps):
        with how.mode():
            done = tuner.step(train, val)
    return done.estimate.hypergradient["l2"], suspects


APIS = {"functions": by_functions, "a tuner": by_a_tuner}
WORDS = {"checkpoint": "checkpoint", "hook": "hook of a", "custom": "custom function"}


def well_conditioned(seed, steps):
    """Does the plain module give nearly the same in bfloat16 and in single precision?

    Normalising groups of two numbers, for example, does not: the exact derivative is nearly 0.
    """
    short, single = (by_hand(seed, steps, Arithmetic(torch.float32, auto, 0.0)) for auto in (True, False))
    return torch.allclose(short, single, rtol=0.1)


def verdict(seed, api, name):
    """Right, or refused for a part of the module; anything else is an assertion that fails."""
    (steps, estimator), how = ESTIMATORS[name], ARITHMETIC[seed // len(ESTIMATORS) % len(ARITHMETIC)]
    try:
        got, suspects = APIS[api](seed, steps, estimator, how)
    except errors.UnsupportedOpError as error:
        _, suspects = program(seed, plain=True)
        reasons = [word for word, text in WORDS.items() if text in str(error)]
        assert reasons and set(reasons) & suspects, f"{seed}, {api}, {name}: refused for no reason: {error}"
        return f"refused: {reasons[0]}"
    except errors.NonFiniteError:
        assert not torch.isfinite(by_hand(seed, steps, how)), (
            f"{seed}, {api}, {name}: the plain module is finite"
        )
        return "diverged"
    except errors.ReplayError:
        assert how.autocast and not well_conditioned(seed, steps), (
            f"{seed}, {api}, {name}: replayed otherwise"
        )
        return "rounding decides"
    expected = by_hand(seed, steps, how)
    if how.autocast and not well_conditioned(seed, steps):
        return "rounding decides"
    close = torch.allclose(got, expected, rtol=how.rtol, atol=1e-12)
    if how.autocast:  # torch has two formulas for some gradients, which round differently
        single = by_hand(seed, steps, Arithmetic(torch.float32, False, 0.0))
        close = close or torch.allclose(got, single, rtol=how.rtol)
    assert close, f"{seed}, {api}, {name}: {float(got):.9g} and not {float(expected):.9g} ({suspects})"
    return "right"


@pytest.mark.parametrize("api", APIS)
def test_each_is_right_or_refused(api):
    names = list(ESTIMATORS)
    found = Counter(verdict(seed, api, names[seed % len(names)]) for seed in range(PROGRAMS))
    print(f"\n{api}: {dict(found)}")
    assert found["right"] > PROGRAMS / 3 and len(found) >= 4
