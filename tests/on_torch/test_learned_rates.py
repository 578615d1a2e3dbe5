"""Options of torch's optimisers as hyperparameters: their hypergradients, and what is refused."""

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import errors

torch = pytest.importorskip("torch")
from hypergrad_torch import ModuleTuner, TorchOptimizer  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

_draw = torch.Generator().manual_seed(3)
X, XV = (torch.randn(n, 3, generator=_draw, dtype=torch.float64) for n in (8, 6))
TRAIN, VAL = (X, X.sin().sum(1)), (XV, XV.sin().sum(1))
STEPS = 3


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def judged(module, hparams, batch):
    return ((module(batch[0]).squeeze(-1) - batch[1]) ** 2).mean()


def of(module):
    def loss(params, hparams, batch):
        return ((functional_call(module, params, (batch[0],)).squeeze(-1) - batch[1]) ** 2).mean()

    return hg.Bilevel(loss, loss)


SGD, AdamW, RMSprop = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
CASES = {
    "rate": (lambda p, h: SGD(p, h[0]), {"lr": lambda h: h[0]}, [0.1]),
    "momentum-and-decay": (
        lambda p, h: SGD(p, 0.1, momentum=h[0], weight_decay=h[1]),
        {"momentum": lambda h: h[0], "weight_decay": lambda h: h[1]},
        [0.8, 0.05],
    ),
    "decoupled-decay": (
        lambda p, h: AdamW(p, h[0], weight_decay=h[1]),
        {"lr": lambda h: h[0], "weight_decay": lambda h: h[1]},
        [0.05, 0.3],
    ),
    "betas": (
        lambda p, h: AdamW(p, 0.05, betas=(h[0], h[1])),
        {"betas": (lambda h: h[0], lambda h: h[1])},
        [0.8, 0.95],
    ),
    "alpha": (
        lambda p, h: RMSprop(p, h[0], alpha=h[1]),
        {"lr": lambda h: h[0], "alpha": lambda h: h[1]},
        [0.02, 0.9],
    ),
}
each_case = pytest.mark.parametrize("make, hypers, values", CASES.values(), ids=CASES)


def differences(make, values, steps, groups=lambda m: m.parameters()):
    """dC2/dλ by central differences of real training."""

    def trained(values):
        module = net()
        optimizer = make(groups(module), values)
        for _ in range(steps):
            optimizer.zero_grad()
            judged(module, None, TRAIN).backward()
            optimizer.step()
        return float(judged(module, None, VAL).detach())

    def slope(k):
        up, down = list(values), list(values)
        up[k], down[k] = up[k] + 1e-5, down[k] - 1e-5
        return (trained(up) - trained(down)) / 2e-5

    return np.array([slope(k) for k in range(len(values))])


def tuner_of(module, optimizer, hypers, values, steps, **options):
    lam = [torch.tensor(v, dtype=torch.float64) for v in values]
    rule = TorchOptimizer(optimizer, hypers)
    return ModuleTuner(
        module,
        optimizer,
        lam,
        inner=judged,
        outer=judged,
        estimator=hg.Greedy(rule) if steps == 1 else hg.Unrolled(rule, steps),
        every=steps,
        **({"hyper_update": hg.SGD(0.0)} | options),
    )


@each_case
class TestHypergradients:
    @pytest.mark.parametrize("steps", [1, STEPS])
    def test_of_a_module_in_training(self, make, hypers, values, steps):
        module = net()
        optimizer = make(module.parameters(), [0.5 * v for v in values])  # λ sets the options
        tuner = tuner_of(module, optimizer, hypers, values, steps)
        for _ in range(steps):
            done = tuner.step(TRAIN, VAL)
        got = np.array([float(h) for h in done.estimate.hypergradient])
        expected = differences(make, values, steps)
        # The first step of Adam does not depend on its betas: zero, up to rounding.
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8 * np.abs(expected).max() + 1e-15)

    @pytest.mark.parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_of_functions(self, make, hypers, values, tape):
        module = net()
        optimizer = make(module.parameters(), [0.5 * v for v in values])
        lam = [torch.tensor(v, dtype=torch.float64) for v in values]
        params = {name: p.detach().clone() for name, p in module.named_parameters()}
        estimator = hg.Unrolled(TorchOptimizer(optimizer, hypers), STEPS, tape=tape)
        found = hg.hypergradient(of(module), params, lam, lambda t: TRAIN, VAL, estimator)
        got, expected = np.array([float(h) for h in found]), differences(make, values, STEPS)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8 * np.abs(expected).max())


class TestTraining:
    def test_groups_have_rates_of_their_own(self):
        groups = lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}]  # noqa: E731

        def make(groups, values):
            return SGD([{**g, "lr": v} for g, v in zip(groups, values, strict=True)])

        module, values = net(), [0.1, 0.02]
        hypers = [{"lr": lambda h: h[0]}, {"lr": lambda h: h[1]}]
        tuner = tuner_of(module, make(groups(module), values), hypers, values, STEPS)
        for _ in range(STEPS):
            done = tuner.step(TRAIN, VAL)
        got = np.array([float(h) for h in done.estimate.hypergradient])
        np.testing.assert_allclose(got, differences(make, values, STEPS, groups), rtol=1e-5)

    @pytest.mark.parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    @pytest.mark.parametrize("kind", [SGD, AdamW])
    def test_groups_of_functions_have_rates_of_their_own(self, kind, tape):
        # The groups take every second tensor, and not in the order of the tree.
        def groups(m):
            w, b, v, c = m.parameters()
            return [{"params": [c, w]}, {"params": [b, v]}]

        def make(groups, values):
            return kind([{**g, "lr": v} for g, v in zip(groups, values, strict=True)])

        module, values = net(), [0.1, 0.02]
        rule = TorchOptimizer(make(groups(module), values), [{"lr": lambda h: h[0]}, {"lr": lambda h: h[1]}])
        lam = [torch.tensor(v, dtype=torch.float64) for v in values]
        params = dict(module.named_parameters())
        found = hg.hypergradient(
            of(module), params, lam, lambda t: TRAIN, VAL, hg.Unrolled(rule, STEPS, tape=tape)
        )
        got = np.array([float(h) for h in found])
        np.testing.assert_allclose(got, differences(make, values, STEPS, groups), rtol=1e-5)

    def test_goes_on_at_the_rate_that_was_learned(self):
        module = net()
        optimizer = SGD(module.parameters(), 0.1)
        tuner = tuner_of(
            module,
            optimizer,
            {"lr": lambda h: h[0]},
            [0.1],
            1,
            hyper_update=hg.SGD(0.01),
            space=hg.Positive(),
        )
        rates = []
        for _ in range(4):
            step = tuner.step(TRAIN, VAL)
            rates.append(float(step.hparams[0]))
            before = module[2].weight.detach().clone()
            tuner_rate = rates[-1]
        module.zero_grad()
        judged(module, None, TRAIN).backward()
        expected = before - tuner_rate * module[2].weight.grad
        tuner.step(TRAIN, VAL)
        assert len(set(rates)) == 4
        torch.testing.assert_close(module[2].weight.detach(), expected, rtol=1e-12, atol=0)

    def test_goes_on_from_a_saved_state(self):
        def fresh():
            torch.manual_seed(0)
            module = net()
            optimizer = SGD(module.parameters(), 0.1, momentum=0.9)
            rule = {"lr": lambda h: h[0]}
            return module, tuner_of(module, optimizer, rule, [0.1], 2, hyper_update=hg.SGD(0.01))

        module, tuner = fresh()
        for _ in range(3):
            tuner.step(TRAIN, VAL)
        saved = {key: value for key, value in tuner.state_dict().items()}
        saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
        for _ in range(3):
            tuner.step(TRAIN, VAL)
        expected = module[2].weight.detach().clone()
        tuner.load_state_dict(saved)  # into the same tuner, whose rate has been learned on
        for _ in range(3):
            tuner.step(TRAIN, VAL)
        assert torch.equal(module[2].weight.detach(), expected)

    def test_a_scheduler_beside_it_is_refused(self):
        module = net()
        optimizer = SGD(module.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        tuner = tuner_of(module, optimizer, {"lr": lambda h: h[0]}, [0.1], 2)
        tuner.step(TRAIN, VAL)
        scheduler.step()
        with pytest.raises(errors.ArgumentError, match="lr is a function of the hyperparameters"):
            tuner.step(TRAIN, VAL)


class TestRefusals:
    @pytest.mark.parametrize(
        "hypers, words",
        [
            ({"rate": lambda h: h[0]}, "'rate' cannot be learned"),
            ({"nesterov": lambda h: h[0]}, "'nesterov' cannot be learned"),
            ({"lr": 0.1}, "a function of the hyperparameters"),
            ([{}, {}], "2 dicts of options for 1 groups"),
        ],
    )
    def test_options_that_cannot_be_learned(self, hypers, words):
        with pytest.raises(errors.ArgumentError, match=words):
            TorchOptimizer(SGD(net().parameters(), 0.1), hypers)

    def test_a_hyperparameter_that_is_an_option(self):
        module, lr = net(), torch.tensor(0.1, dtype=torch.float64)
        optimizer = SGD(module.parameters(), lr=lr)
        params = {name: p.detach().clone() for name, p in module.named_parameters()}
        words = r"the optimiser's lr is hparams\['lr'\].*TorchOptimizer"
        for estimator in (hg.Greedy(optimizer), hg.Unrolled(optimizer, 2)):
            with pytest.raises(errors.ArgumentError, match=words):
                hg.hypergradient(of(module), params, {"lr": lr}, lambda t: TRAIN, VAL, estimator)
        with pytest.raises(errors.ArgumentError, match=words):
            ModuleTuner(module, optimizer, {"lr": lr}, inner=judged, outer=judged)

    def test_an_option_with_a_graph(self):
        module, log_lr = net(), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        optimizer = SGD(module.parameters(), lr=log_lr.exp())
        params = {name: p.detach().clone() for name, p in module.named_parameters()}
        with pytest.raises(errors.ArgumentError, match=r"graph.*TorchOptimizer"):
            hg.hypergradient(
                of(module),
                params,
                {"l": log_lr},
                lambda t: TRAIN,
                VAL,
                hg.Greedy(optimizer, allow_unused=True),
            )
