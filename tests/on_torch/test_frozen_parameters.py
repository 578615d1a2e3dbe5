"""Parameters of a module with requires_grad=False stay fixed, and are no part of any derivative."""

import pytest

import hypergrad as hg
from hypergrad import errors

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

_draw = torch.Generator().manual_seed(3)
X, XV = (torch.randn(n, 3, generator=_draw, dtype=torch.float64) for n in (8, 6))
TRAIN, VAL = (X, X.sin().sum(1)), (XV, XV.sin().sum(1))
LAM = torch.tensor(-2.0, dtype=torch.float64)
RULES = {
    "sgd": hg.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "adamw": hg.AdamW(0.1, weight_decay=0.1),
    "rmsprop": hg.RMSprop(0.1),
    "adagrad": hg.Adagrad(0.1),
    "clipped": hg.ClipNorm(hg.SGD(0.1), 0.1),
    "custom": ((lambda p: ()), lambda g, s, p, h: ({k: 0.9 * p[k] - 0.1 * g[k] for k in p}, s)),
}
ESTIMATORS = {
    "greedy": lambda rule: hg.Greedy(rule),
    "full": lambda rule: hg.Unrolled(rule, 3),
    "states": lambda rule: hg.Unrolled(rule, 3, tape=hg.States()),
    "binomial": lambda rule: hg.Unrolled(rule, 3, tape=hg.Binomial(2)),
    "offload": lambda rule: hg.Unrolled(rule, 3, tape=hg.Offload(hg.States())),
    "forward": lambda rule: hg.Forward(rule, 3),
}


def net():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    module[0].requires_grad_(False)
    return module


def problem(module, frozen):
    def judged(params, hparams, batch):
        params = frozen | params
        return ((functional_call(module, params, (batch[0],)).squeeze(-1) - batch[1]) ** 2).mean()

    def trained(params, hparams, batch):
        every = (frozen | params).values()
        return judged(params, hparams, batch) + hparams.exp() * sum((w**2).sum() for w in every)

    return hg.Bilevel(trained, judged)


def split(module):
    """All parameters as they are; the trained ones alone; the frozen ones alone."""
    every = dict(module.named_parameters())
    trained = {name: p.detach().clone() for name, p in every.items() if p.requires_grad}
    return every, trained, {name: p.detach() for name, p in every.items() if not p.requires_grad}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_they_stay_fixed_in_every_later_estimate(estimator, rule):
    module = net()
    every, trained, frozen = split(module)
    whole, part = problem(module, {}), problem(module, frozen)
    estimator = estimator(rule)
    state, alone = estimator.init(whole, every, LAM), estimator.init(part, trained, LAM)
    for _ in range(2):
        out = estimator.estimate(whole, state, LAM, lambda t: TRAIN, VAL)
        expected = estimator.estimate(part, alone, LAM, lambda t: TRAIN, VAL)
        torch.testing.assert_close(out.hypergradient, expected.hypergradient, rtol=1e-11, atol=0)
        state, alone = out.state, expected.state
        for name, p in state.params.items():
            want = frozen[name] if name in frozen else alone.params[name]
            torch.testing.assert_close(p.detach(), want, rtol=1e-11 * (name not in frozen), atol=0)


@pytest.mark.parametrize("solver", [hg.CG, hg.MINRES, hg.GMRES, hg.Direct])
def test_they_are_no_unknowns_of_a_solve(solver):
    module = net()
    every, trained, frozen = split(module)
    estimator = hg.Implicit(hg.Damped(solver(rtol=1e-10), 2.0), checks=hg.Checks(away="ignore"))
    run = lambda f, p: hg.hypergradient(f, p, LAM, lambda t: TRAIN, VAL, estimator)  # noqa: E731
    got, expected = run(problem(module, {}), every), run(problem(module, frozen), trained)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)


def test_plain_tensors_are_trained_whatever_their_flag():
    module = net()
    values = {name: p.detach() for name, p in module.named_parameters()}
    estimator = hg.Greedy(hg.SGD(0.1))
    whole = problem(module, {})
    out = estimator.estimate(whole, estimator.init(whole, values, LAM), LAM, TRAIN, VAL)
    assert not torch.equal(out.state.params["0.weight"], values["0.weight"])


def test_hyperparameters_cannot_be_frozen():
    module = net()
    every, _, _ = split(module)
    lam = nn.Parameter(LAM.clone(), requires_grad=False)
    with pytest.raises(errors.ArgumentError, match=r"requires_grad=False.*detach"):
        hg.hypergradient(problem(module, {}), every, lam, TRAIN, VAL, hg.Greedy(hg.SGD(0.1)))


def test_a_module_that_is_frozen_as_a_whole_has_nothing_to_train():
    module = net().requires_grad_(False)
    with pytest.raises(errors.ArgumentError, match="requires_grad=False"):
        hg.hypergradient(
            problem(module, {}), dict(module.named_parameters()), LAM, TRAIN, VAL, hg.Greedy(hg.SGD(0.1))
        )


def test_integers_cannot_leave_them_out():
    module = net()
    estimator = hg.Unrolled(hg.SGD(0.1, momentum=0.9), 3, tape=hg.Reversible())
    with pytest.raises(errors.ArgumentError, match="requires_grad=False"):
        hg.hypergradient(
            problem(module, {}), dict(module.named_parameters()), LAM, lambda t: TRAIN, VAL, estimator
        )
