"""`ModuleTuner` runs the recipe of `Tuner` in place: spaces, update rules, `tune`, history."""

import copy

import numpy as np
import pytest
import torch
from hypergrad_torch import ModuleTuner
from torch import nn, optim
from torch.func import functional_call

import hypergrad as hg
from hypergrad.errors import ArgumentError

SPACES = {
    "positive": hg.Positive(),
    "softplus": hg.Positive("softplus"),
    "interval": hg.Interval(0.0, 2.0),
    "clipped": hg.NonNegative(),
    "tree": {"l2": hg.Positive(), "noise": hg.NonNegative()},
}
RULES = {
    "sgd": (lambda p: optim.SGD(p, 0.3), hg.SGD(0.3)),
    "adam": (lambda p: optim.Adam(p, 0.1), hg.Adam(0.1)),
}


class Task:
    """A linear model with a penalty for each feature and noise that comes with the batch."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        self.train = [(draw(12, 4), draw(12, 1), draw(12, 4)) for _ in range(12)]
        self.val = (draw(20, 4), draw(20, 1))
        torch.manual_seed(1)
        self.model = nn.Linear(4, 1).double()
        self.hparams = {
            "l2": torch.full((4,), 0.5, dtype=torch.float64),
            "noise": torch.tensor(0.3, dtype=torch.float64),
        }

    @staticmethod
    def inner(model, h, batch):
        x, y, e = batch
        return ((model(x + h["noise"] * e) - y) ** 2).mean() + (h["l2"] * model.weight**2).sum()

    @staticmethod
    def outer(model, h, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def problem(self):
        """The same losses as functions of the parameters."""
        model = copy.deepcopy(self.model)

        class Loss(nn.Module):
            def __init__(self, loss):
                super().__init__()
                self.model, self.loss = model, loss

            def forward(self, h, batch):
                return self.loss(self.model, h, batch)

        def function(loss):
            module = Loss(loss)
            return lambda p, h, b: functional_call(module, {f"model.{k}": v for k, v in p.items()}, (h, b))

        return hg.Bilevel(function(self.inner), function(self.outer))

    def tuner(self, **options):
        given = {"inner": self.inner, "outer": self.outer, "every": 2} | options
        return ModuleTuner(self.model, optim.SGD(self.model.parameters(), 0.05), self.hparams, **given)

    def params(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("rule", RULES)
def test_a_run_is_that_of_the_pure_tuner(space, rule):
    task = Task()
    pure = hg.Tuner(task.problem(), hg.Greedy(hg.SGD(0.05)), space, RULES[rule][1], every=2)
    run = pure.run(task.params(), copy.deepcopy(task.hparams), task.train, [task.val], 12)
    tuner = task.tuner(space=space, hyper_update=RULES[rule][1])
    for batch in task.train:
        tuner.step(batch, task.val)
    close(task.hparams, run.hparams)
    close(task.params(), run.params)
    for name in ("inner_values", "outer_values", "hypergradient_norms", "cost", "steps"):
        np.testing.assert_allclose(getattr(tuner.history, name), getattr(run.history, name), rtol=1e-10)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("rule", RULES)
def test_an_optimiser_of_torch_updates_free_coordinates(space, rule):
    ours, theirs = Task(), Task()
    one = ours.tuner(space=space, hyper_update=RULES[rule][1])
    other = theirs.tuner(space=space, hyper_update=RULES[rule][0](theirs.hparams.values()))
    for batch in ours.train:
        one.step(batch, ours.val)
        other.step(batch, ours.val)
    close(ours.hparams, theirs.hparams)
    assert all(h.grad is None for h in theirs.hparams.values())


def test_hyperparameters_outside_of_their_space_are_refused():
    task = Task()
    task.hparams["noise"].fill_(-1.0)
    with pytest.raises(ArgumentError, match=r"hparams\['noise'\]"):
        task.tuner(space=hg.Positive())


class TestTune:
    def left(self, task, optimizer):
        """All that must stay as it is."""
        grads = {
            name: None if p.grad is None else p.grad.clone() for name, p in task.model.named_parameters()
        }
        return copy.deepcopy([task.params(), optimizer.state_dict(), torch.get_rng_state(), grads])

    @pytest.mark.parametrize(
        "make",
        [
            lambda optimizer: hg.Greedy(optimizer),
            lambda optimizer: hg.Greedy(optimizer, response="gradient"),
            lambda optimizer: hg.Implicit(hg.CG(), checks=hg.Checks(away="ignore")),
        ],
        ids=["greedy", "greedy-eq-3", "implicit"],
    )
    def test_it_updates_by_the_hypergradient_and_touches_nothing_else(self, make):
        task = Task()
        optimizer = optim.Adam(task.model.parameters(), 0.05)
        estimator = make(optimizer)
        tuner = ModuleTuner(
            task.model, optimizer, task.hparams, inner=task.inner, outer=task.outer, every=5,
            estimator=estimator, hyper_update=hg.SGD(0.1),
        )  # fmt: skip
        for batch in task.train[:2]:
            tuner.step(batch, task.val)
        for p in task.model.parameters():
            p.grad = torch.ones_like(p)
        before, lam = self.left(task, optimizer), copy.deepcopy(task.hparams)
        step = tuner.tune(task.train[2], task.val)
        after = self.left(task, optimizer)
        for x, y in zip(
            torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True
        ):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        assert step.updated and step.trained == 0 and tuner.updates == 1
        g = step.estimate.hypergradient
        for name in lam:
            torch.testing.assert_close(task.hparams[name], lam[name] - 0.1 * g[name], rtol=1e-12, atol=0)
        if not isinstance(estimator, hg.Implicit):
            return
        functional = hg.hypergradient(task.problem(), task.params(), lam, task.train[2], task.val, estimator)
        close(g, functional)

    def test_of_a_greedy_step_is_the_hypergradient_of_the_step_itself(self):
        one, other = Task(), Task()
        tuned = one.tuner(hyper_update=hg.SGD(0.1)).tune(one.train[0], one.val)
        stepped = other.tuner(hyper_update=hg.SGD(0.1), every=1).step(one.train[0], one.val)
        close(tuned.estimate.hypergradient, stepped.estimate.hypergradient)
        close(one.hparams, other.hparams)
        assert not torch.equal(one.model.weight, other.model.weight)

    def test_what_needs_training_steps_says_so(self):
        task = Task()
        optimizer = optim.SGD(task.model.parameters(), 0.1)
        tuner = ModuleTuner(
            task.model, optimizer, task.hparams, inner=task.inner, outer=task.outer, every=4,
            estimator=hg.Unrolled(optimizer, steps=3),
        )  # fmt: skip
        with pytest.raises(ArgumentError, match="takes no training steps"):
            tuner.tune(task.train[0], task.val)


class TestHistory:
    def test_there_is_a_row_for_each_update(self, tmp_path):
        task = Task()
        history = task.tuner(hyper_update=hg.SGD(0.1)).run(task.train, [task.val], 9, progress=False)
        assert history.steps.tolist() == [0, 2, 4, 6, 8] and len(history.inner_values) == 9
        np.testing.assert_array_equal(history.values["hparams['l2']"][-1], task.hparams["l2"].numpy())
        history.save(tmp_path / "history.npz")
        assert hg.History.load(tmp_path / "history.npz").steps.tolist() == history.steps.tolist()
        history.plot(tmp_path / "history.png")
        assert (tmp_path / "history.png").stat().st_size > 0

    def test_half_a_run_resumed_is_the_whole(self):
        whole, half = Task(), Task()
        options = {"space": hg.Positive(), "hyper_update": hg.Adam(0.1)}
        expected = whole.tuner(**options).run(whole.train, [whole.val], 10, progress=False)
        first = half.tuner(**options)
        first.run(half.train, [half.val], 5, progress=False)
        state = copy.deepcopy(first.state_dict())
        rest = Task()
        second = rest.tuner(**options)
        second.load_state_dict(state)
        resumed = second.run(rest.train, [rest.val], 10, progress=False)
        close(rest.hparams, whole.hparams)
        np.testing.assert_allclose(resumed.inner_values, expected.inner_values, rtol=1e-12)
