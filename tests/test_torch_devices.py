"""Tensors that are not on the CPU: `meta`, which has no values to read, and CUDA where there is one."""

import copy
import re
from contextlib import contextmanager
from functools import partial

import optree
import pytest
import torch
from hypergrad_torch import ModuleTuner
from torch import nn, optim
from torch.nn import functional as F

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize
RULES = {
    "sgd": hg.SGD(0.1),
    "momentum": hg.SGD(0.1, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "nesterov": hg.SGD(0.1, momentum=0.9, nesterov=True),
    "learned-rate": hg.SGD(lambda h: h["noise"]),
    "adam": hg.Adam(0.02, weight_decay=0.01, amsgrad=True),
    "adamw": hg.AdamW(0.02),
    "rmsprop": hg.RMSprop(0.02, momentum=0.5, centered=True),
    "adagrad": hg.Adagrad(0.1, lr_decay=0.1),
    "clipped": hg.ClipNorm(hg.Adam(0.02), 0.5),
}
every_rule = parametrize("rule", RULES.values(), ids=RULES)
TRAINING = {
    "greedy": hg.Greedy,
    "gradient": partial(hg.Greedy, response="gradient"),
    "no-lookahead": partial(hg.Greedy, lookahead=False),
    "differences": partial(hg.Greedy, mixed=hg.FiniteDifference()),
    "one-sided-differences": partial(hg.Greedy, mixed=hg.FiniteDifference(sides=1)),
    "full": partial(hg.Unrolled, steps=3),
    "states": partial(hg.Unrolled, steps=3, tape=hg.States()),
    "truncated": partial(hg.Unrolled, steps=3, truncate=2),
    "truncated-states": partial(hg.Unrolled, steps=3, truncate=2, tape=hg.States()),
}
every_training = parametrize("make", TRAINING.values(), ids=TRAINING)
FORGIVING = float("inf")
IMPLICIT = {
    "cg": hg.Implicit(hg.CG(6), damping=0.1, tolerance=FORGIVING),
    "neumann": hg.Implicit(hg.Neumann(6), damping=0.1, tolerance=FORGIVING),
    "neumann-rtol": hg.Implicit(hg.Neumann(6, step_size=0.1, rtol=1e-2), tolerance=FORGIVING),
    "minres": hg.Implicit(hg.MINRES(6), tolerance=FORGIVING),
    "gmres": hg.Implicit(hg.GMRES(6, restart=4), tolerance=FORGIVING),
    "bicgstab": hg.Implicit(hg.BiCGStab(6), tolerance=FORGIVING),
    "preconditioned": hg.Implicit(hg.CG(6, preconditioner=hg.Nystrom(4)), tolerance=FORGIVING),
    "direct": hg.Implicit(hg.Direct(), tolerance=FORGIVING),
    "identity": hg.Implicit(hg.Identity(0.1), tolerance=FORGIVING),
    "cg-differences": hg.Implicit(hg.CG(6), tolerance=FORGIVING, mixed=hg.FiniteDifference()),
}
every_implicit = parametrize("estimator", IMPLICIT.values(), ids=IMPLICIT)


def predict(params, x):
    return (x @ params["w"] + params["b"]).tanh() @ params["v"]


def fit(params, hparams, batch):
    return (predict(params, batch["x"]) - batch["y"]).square().mean()


def noisy_l2(params, hparams, batch):
    strengths = hparams["log_l2"].exp()
    squares = {name: p.square().sum() for name, p in params.items()}
    penalty = strengths[0] * (squares["w"] + squares["b"]) + strengths[1] * squares["v"]
    noisy = {"x": batch["x"] + hparams["noise"] * batch["noise"], "y": batch["y"]}
    return fit(params, hparams, noisy) + penalty


PROBLEM = hg.Bilevel(noisy_l2, fit)


def task(device, dtype=torch.float64):
    """Parameters, hyperparameters, T1 batches and a T2 batch: the same numbers on every device."""
    gen = torch.Generator().manual_seed(0)

    def put(tree):
        return optree.tree_map(lambda x: x.to(device, dtype), tree)

    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    params = {"w": draw(3, 4) / 4, "b": draw(4) / 4, "v": draw(4) / 4}
    hparams = {"log_l2": torch.tensor([1.0, 1.5]), "noise": torch.tensor(0.3)}
    batches = [{"x": draw(8, 3), "noise": draw(8, 3), "y": draw(8)} for _ in range(4)]
    return put((params, hparams, batches[:3], batches[3]))


def estimate(estimator, device, dtype=torch.float64, estimates=1):
    params, hparams, train, val = task(device, dtype)
    state = estimator.init(PROBLEM, params, hparams)
    for _ in range(estimates):
        batches = train[:1] if isinstance(estimator, hg.Implicit) else lambda t: train[t % 3]
        out = estimator.estimate(PROBLEM, state, hparams, batches, val)
        state = out.state
    return out


def tensors(tree):
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def lies_on(tree, device):
    """Nothing that was computed is anywhere else."""
    assert tensors(tree)
    for accessor, leaf in zip(optree.tree_accessors(tree), optree.tree_leaves(tree), strict=True):
        if isinstance(leaf, torch.Tensor):
            assert leaf.device.type == device, f"{accessor.codify('out')} is on {leaf.device}"
        else:
            assert isinstance(leaf, bool | int | float), accessor.codify("out")


def net(device, dtype=None):
    """An MLP with batch normalisation."""
    with torch.device(device):
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    return model.to(dtype)


def mlp(device, dtype=None):
    with torch.device(device):
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def classify(model, hparams, batch):
    return F.cross_entropy(model(batch["x"]), batch["label"])


def with_penalty(model, hparams, batch):
    noisy = batch | {"x": batch["x"] + hparams["noise"] * batch["noise"]}
    squares = sum(p.square().sum() for p in model.parameters())
    return classify(model, hparams, noisy) + hparams["log_l2"].exp().sum() * squares


def module_tuner(device, model, make=optim.Adam, dtype=torch.float64, estimator=None, **options):
    """A tuner, and a batch of T1 and one of T2."""
    torch.manual_seed(0)
    # Drawn on the CPU, so that the numbers are the same.
    model = model("cpu", dtype).to(device)
    _, hparams, train, val = task(device, dtype)
    hparams = {name: h.requires_grad_() for name, h in hparams.items()}
    optimizer, hyper = make(model.parameters(), lr=0.05), optim.Adam(hparams.values(), lr=0.01)
    labels = torch.randint(2, (8,)).to(device)
    given = {"inner": with_penalty, "outer": classify, "hyper_update": hyper, "every": 2} | options
    tuner = ModuleTuner(model, optimizer, hparams, estimator=estimator and estimator(optimizer), **given)
    return tuner, train[0] | {"label": labels}, val | {"label": labels}


MODULE_ESTIMATORS = {
    "default": None,
    "gradient": lambda optimizer: hg.Greedy(optimizer, response="gradient"),
    "differences": lambda optimizer: hg.Greedy(optimizer, mixed=hg.FiniteDifference()),
    "full": lambda optimizer: hg.Unrolled(optimizer, steps=2),
    "states": lambda optimizer: hg.Unrolled(optimizer, steps=2, tape=hg.States()),
    "implicit": lambda optimizer: hg.Implicit(hg.Identity(0.1), tolerance=FORGIVING),
}
every_module_estimator = parametrize("estimator", MODULE_ESTIMATORS.values(), ids=MODULE_ESTIMATORS)
OPTIMISERS = {
    "sgd": partial(optim.SGD, momentum=0.9),
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "rmsprop": partial(optim.RMSprop, centered=True, momentum=0.5),
    "adagrad": optim.Adagrad,
}


class TestMeta:
    """A device without values: whoever reads one fails at once, so none is read."""

    def check(self, out, dtype):
        hparams = task("meta", dtype)[1]
        assert out.hypergradient.keys() == hparams.keys()
        for name, h in hparams.items():
            g = out.hypergradient[name]
            assert (g.shape, g.dtype, g.device) == (h.shape, h.dtype, h.device)
        lies_on(out, "meta")

    @every_training
    @every_rule
    def test_estimators_that_train(self, rule, make):
        estimator = make(rule)
        out = estimate(estimator, "meta", estimates=2 if estimator.training_steps == 1 else 1)
        self.check(out, torch.float64)

    @every_implicit
    def test_implicit(self, estimator):
        self.check(estimate(estimator, "meta"), torch.float64)

    @parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @every_training
    def test_other_precisions(self, make, dtype):
        self.check(estimate(make(hg.Adam(0.02)), "meta", dtype), dtype)

    SPACES = {
        "real": hg.Real(),
        "positive": hg.Positive(),
        "softplus": {"log_l2": hg.Positive("softplus"), "noise": hg.NonNegative()},
        "interval": hg.Interval(-1.0, 2.0),
        "simplex": {"log_l2": hg.Simplex(), "noise": hg.Real()},
    }

    @parametrize("space", SPACES.values(), ids=SPACES)
    def test_tuner(self, space):
        self.tunes(hg.Tuner(PROBLEM, hg.Greedy(hg.Adam(0.02)), space, every=2))

    def test_tuner_that_unrolls(self):
        self.tunes(hg.Tuner(PROBLEM, hg.Unrolled(hg.Adam(0.02), 2), every=3, restart=True))

    def test_tuner_with_an_implicit_estimator(self):
        self.tunes(hg.Tuner(PROBLEM, IMPLICIT["cg"], every=2, update=hg.Adam(0.02)))

    def tunes(self, tuner):
        params, hparams, train, val = task("meta")
        state, estimates = tuner.init(params, hparams), 0
        for _ in range(6):
            state, step = tuner.step(state, lambda t: train[t % 3], val)
            lies_on((state, step), "meta")
            estimates += step.estimate is not None
        assert estimates > 0
        lies_on(tuner.hparams(state), "meta")

    @every_module_estimator
    @parametrize("model", [mlp, net], ids=["mlp", "batch-norm"])
    def test_module_tuner(self, model, estimator):
        self.trains(*module_tuner("meta", model, estimator=estimator))

    @parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
    def test_module_tuner_by_every_optimiser(self, make):
        self.trains(*module_tuner("meta", net, make))

    def test_module_tuner_that_clips(self):
        self.trains(*module_tuner("meta", net, max_norm=0.5))

    def test_module_tuner_of_micro_batches(self):
        tuner, train, val = module_tuner("meta", net, micro_batches=2)
        self.trains(tuner, [train, train], val)

    def test_module_made_on_meta(self):
        with torch.device("meta"):
            model, hparams = net("meta"), {"log_l2": torch.zeros(2), "noise": torch.zeros(())}
            batch = {"x": torch.zeros(8, 3), "noise": torch.zeros(8, 3), "label": torch.zeros(8).long()}
        hyper = optim.Adam(hparams.values(), lr=0.01)
        options = {"inner": with_penalty, "outer": classify, "hyper_update": hyper, "every": 2}
        self.trains(ModuleTuner(model, optim.Adam(model.parameters()), hparams, **options), batch, batch)

    def trains(self, tuner, train, val):
        tuned = []
        for _ in range(3):
            metrics = tuner.step(train, val)
            tuned.append(metrics.estimate is not None)
            lies_on(metrics, "meta")
        assert tuned == [False, True, False] and tuner.steps == 3
        lies_on((dict(tuner.model.state_dict()), tuner.hparams), "meta")


def misplaced(first, second):
    """Arguments of an estimate on one device, one hyperparameter on another."""
    params, hparams, train, val = task(first)
    return params, hparams | {"noise": hparams["noise"].to(second)}, train, val


def refuses_two_devices(first, second):
    params, hparams, train, val = misplaced(first, second)
    for estimator in (hg.Greedy(hg.SGD(0.1)), hg.Implicit()):
        with pytest.raises(errors.LeafTypeError) as caught:
            estimator.init(PROBLEM, params, hparams)
        assert "hparams['noise']" in str(caught.value)
        assert f"device {first}" in str(caught.value) and f"device {second}" in str(caught.value)
        with pytest.raises(errors.LeafTypeError, match=re.escape("hparams['noise']")):
            estimator.estimate(PROBLEM, hg.State(params), hparams, train[0], val)
    mixed = params | {"w": params["w"].to(second)}
    with pytest.raises(errors.LeafTypeError, match=re.escape("params['w']")):
        hg.Greedy(hg.SGD(0.1)).init(PROBLEM, mixed, task(first)[1])
    model = mlp(first, torch.float64)
    hparams = {name: h.requires_grad_() for name, h in task(second)[1].items()}
    options = {"inner": with_penalty, "outer": classify, "hyper_update": optim.SGD(hparams.values())}
    with pytest.raises(errors.LeafTypeError, match=r"hparams\['log_l2'\].*params\['0.bias'\]"):
        ModuleTuner(model, optim.SGD(model.parameters()), hparams, **options)


def test_two_devices_are_refused():
    refuses_two_devices("cpu", "meta")


@contextmanager
def no_waiting():
    """Raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestCuda:
    DEVICE = "cuda"

    def agree(self, mine, expected, tolerance=1e-10):
        for a, b in zip(tensors(mine), tensors(expected), strict=True):
            assert (a.cpu() - b).double().norm() <= tolerance * b.double().norm()

    @parametrize("make", [TRAINING[name] for name in ("greedy", "gradient", "full", "states", "truncated")])
    @parametrize("name", ["momentum", "adam", "rmsprop", "clipped"])
    def test_estimators_that_train(self, name, make):
        estimator = make(RULES[name])
        mine, expected = (estimate(estimator, device, estimates=3) for device in (self.DEVICE, "cpu"))
        self.agree(mine.hypergradient, expected.hypergradient)
        self.agree((mine.state, mine.outer_value), (expected.state, expected.outer_value))
        lies_on(mine, self.DEVICE)

    def test_differences(self):
        # They amplify the rounding in which devices differ.
        estimator = TRAINING["differences"](RULES["momentum"])
        mine, expected = (estimate(estimator, device) for device in (self.DEVICE, "cpu"))
        self.agree(mine.hypergradient, expected.hypergradient, 1e-7)
        assert estimator.check(mine) is mine

    @parametrize("name", ["cg", "neumann", "direct", "identity"])
    def test_implicit(self, name):
        estimator = hg.Implicit(hg.CG(rtol=1e-12), tolerance=FORGIVING) if name == "cg" else IMPLICIT[name]
        mine, expected = (estimate(estimator, device) for device in (self.DEVICE, "cpu"))
        self.agree(mine.hypergradient, expected.hypergradient)
        assert estimator.check(mine) is mine

    def test_module_tuner(self):
        ends = []
        for device in (self.DEVICE, "cpu"):
            tuner, train, val = module_tuner(device, net)
            for _ in range(6):
                metrics = tuner.step(train, val)
            ends.append((dict(tuner.model.state_dict()), tuner.hparams, metrics.outer_value))
        self.agree(*ends)

    def test_faults_are_raised_once_asked_for(self):
        params, hparams, train, val = task(self.DEVICE)
        estimator = hg.Greedy(hg.SGD(0.1))
        state = estimator.init(PROBLEM, params, hparams)
        out = estimator.estimate(PROBLEM, state, hparams, train[0], val | {"y": val["y"] * torch.nan})
        with pytest.raises(errors.NonFiniteError) as caught:
            estimator.check(out)
        assert caught.value.where == "T2"

    def test_two_devices_are_refused(self):
        refuses_two_devices("cpu", f"{self.DEVICE}:0")

    @parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_its_own_generator_is_replayed(self, tape):
        # Where a step is taken again it draws the same noise: the tapes agree, and so do two estimates.
        def drawn(params, hparams, batch):
            return noisy_l2(params, hparams, batch | {"noise": torch.randn_like(batch["x"])})

        params, hparams, train, val = task(self.DEVICE)
        problem = hg.Bilevel(drawn, fit)

        def once(tape):
            torch.manual_seed(3)
            estimator = hg.Unrolled(hg.Adam(0.02), 3, tape=tape)
            state = estimator.init(problem, params, hparams)
            return estimator.estimate(problem, state, hparams, train, val), torch.rand((), device=self.DEVICE)

        (out, after), (full, after_full) = once(tape), once(hg.Full())
        self.agree(out.hypergradient, optree.tree_map(torch.Tensor.cpu, full.hypergradient))
        assert torch.equal(after, after_full)
        before = torch.cuda.get_rng_state()
        with pytest.raises(errors.ArgumentError):
            once_failing = hg.Bilevel(lambda *args: drawn(*args).expand(2), fit)
            hg.hypergradient(once_failing, params, hparams, train[0], val, hg.Greedy(hg.SGD(0.1)))
        assert torch.equal(torch.cuda.get_rng_state(), before)

    @parametrize("make", [TRAINING[name] for name in ("greedy", "gradient", "differences")])
    @parametrize("name", ["momentum", "learned-rate", "adam", "clipped"])
    def test_greedy_does_not_wait(self, name, make):
        params, hparams, train, val = task(self.DEVICE)
        estimator = make(RULES[name])
        state = estimator.init(PROBLEM, params, hparams)
        out = estimator.estimate(PROBLEM, state, hparams, train[0], val)  # libraries set up
        with no_waiting():
            estimator.estimate(PROBLEM, out.state, hparams, train[1], val)

    @parametrize("name", ["sgd", "adam", "rmsprop"])
    @parametrize("response", ["update", "gradient"])
    def test_module_tuner_does_not_wait(self, response, name):
        estimator = lambda optimizer: hg.Greedy(optimizer, response)  # noqa: E731
        options = {"estimator": estimator, "max_norm": 0.5}
        tuner, train, val = module_tuner(self.DEVICE, net, OPTIMISERS[name], **options)
        tuner.step(train, val)
        tuner.step(train, val)
        with no_waiting():
            tuner.step(train, val)
            assert tuner.step(train, val).estimate is not None

    def test_a_run_resumes_bit_for_bit(self):
        tuner, train, val = module_tuner(self.DEVICE, net)
        tuner.step(train, val)
        saved = copy.deepcopy(tuner.state_dict())
        ends = []
        for _ in range(2):
            tuner.load_state_dict(copy.deepcopy(saved))
            for _ in range(3):
                tuner.step(train, val)
            ends.append(copy.deepcopy((tuner.model.state_dict(), tuner.hparams)))
        assert all(map(torch.equal, *(tensors((dict(model), hparams)) for model, hparams in ends)))
