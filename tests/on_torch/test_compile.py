"""A whole estimate as one program: the same numbers, compiled once."""

import pytest
import torch
from hypergrad_torch import compile

import hypergrad as hg
from hypergrad import errors

# The compiler's front half alone, which is quick; one test goes all the way.
TRACED = {"backend": "eager"}


def net(params, x):
    return torch.tanh(x @ params["w"] + params["b"]) @ params["v"]


def judged(params, hparams, batch):
    return torch.mean((net(params, batch["x"]) - batch["y"]) ** 2)


def trained(params, hparams, batch):
    noisy = batch | {"x": batch["x"] + hparams["noise"] * batch["noise"]}
    return judged(params, hparams, noisy) + torch.exp(hparams["log_l2"]) * torch.sum(params["w"] ** 2)


PROBLEM = hg.Bilevel(trained, judged)


def problem(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    params = {"w": draw(4, 6), "b": draw(6), "v": draw(6)}
    hparams = {"log_l2": torch.tensor(-2.0, dtype=dtype), "noise": torch.tensor(0.3, dtype=dtype)}
    batches = [{"x": draw(16, 4), "y": draw(16), "noise": draw(16, 4)} for _ in range(4)]
    return params, hparams, batches[:3], batches[3]


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in (tree[name] for name in sorted(tree))])


def close(mine, other, tolerance):
    assert (flat(mine) - flat(other)).norm() <= tolerance * flat(other).norm()


ESTIMATORS = [
    hg.Greedy(hg.SGD(0.1, momentum=0.9)),
    hg.Greedy(hg.Adam(0.1), response="gradient", lookahead=False),
    hg.Greedy(hg.SGD(0.1), products=hg.FiniteDifference()),
    hg.Unrolled(hg.Adam(0.1), 3),
    hg.Unrolled(hg.RMSprop(0.1), 3, tape=hg.States()),
    hg.Implicit(hg.Damped(hg.CG(20, rtol=1e-3), 30.0), checks=hg.Checks(tolerance=float("inf"))),
    hg.Implicit(hg.Damped(hg.Neumann(4, 0.01), 30.0), checks=hg.Checks(tolerance=float("inf"))),
    hg.Implicit(hg.Damped(hg.Direct(), 30.0), checks=hg.Checks(tolerance=float("inf"))),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_it_is_what_the_eager_estimate_is(estimator):
    params, hparams, train, val = problem(torch.float64)
    train = train if isinstance(estimator, hg.Unrolled) else train[0]
    state = estimator.init(PROBLEM, params, hparams)
    estimate = compile(estimator.estimate, **TRACED)
    for _ in range(3):
        expected = estimator.estimate(PROBLEM, state, hparams, train, val)
        found = estimator.check(estimate(PROBLEM, state, hparams, train, val))
        close(found.hypergradient, expected.hypergradient, 1e-10)
        close(found.state.params, expected.state.params, 1e-12)
        assert int(found.state.step) == int(expected.state.step)
        state = found.state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_all_the_way_in_float32():
    params, hparams, train, val = problem(torch.float32)
    estimator = hg.Greedy(hg.SGD(0.1))
    state = estimator.init(PROBLEM, params, hparams)
    found = compile(estimator.estimate)(PROBLEM, state, hparams, train[0], val)
    expected = estimator.estimate(PROBLEM, state, hparams, train[0], val)
    close(found.hypergradient, expected.hypergradient, 1e-6)
    close(found.state.params, expected.state.params, 1e-6)


def test_it_is_traced_once_for_all_values_and_steps():
    traced = []

    def loss(params, hparams, batch):
        traced.append(1)
        return trained(params, hparams, batch)

    params, hparams, train, val = problem(torch.float64)
    estimator, losses = hg.Greedy(hg.SGD(0.1)), hg.Bilevel(loss, judged)
    estimate, state = compile(estimator.estimate, **TRACED), estimator.init(losses, params, hparams)
    for k in range(4):
        state = estimate(losses, state, hparams, train[k % 3], val).state
    assert len(traced) == 1
    estimate(losses, state, hparams, {name: x[:8] for name, x in train[0].items()}, val)
    assert len(traced) == 2


class TestFaults:
    def test_come_in_the_report_and_are_raised_by_check(self):
        params, hparams, train, val = problem(torch.float64)
        estimator = hg.Greedy(hg.SGD(0.1))
        state, bad = estimator.init(PROBLEM, params, hparams), train[0] | {"y": train[0]["y"] * torch.nan}
        out = compile(estimator.estimate, **TRACED)(PROBLEM, state, hparams, bad, val)
        with pytest.raises(errors.NonFiniteError) as caught:
            estimator.check(out)
        assert caught.value.where == "T1"

    def test_a_loss_with_tensors_of_its_own(self):
        params, hparams, train, val = problem(torch.float64)
        held = hg.Bilevel(lambda p, h, b: trained(p, h, train[0]), judged)
        estimator = hg.Greedy(hg.SGD(0.1))
        state = estimator.init(held, params, hparams)
        with pytest.raises(errors.ArgumentError, match="pass them in the batch"):
            compile(estimator.estimate, **TRACED)(held, state, hparams, train[0], val)

    @pytest.mark.parametrize("tape", [hg.Full(), hg.States()], ids=repr)
    def test_draws_that_would_be_replayed(self, tape):
        params, hparams, train, val = problem(torch.float64)

        def noisy(params, hparams, batch):
            return trained(params, hparams, batch | {"noise": torch.randn_like(batch["x"])})

        losses, estimator = hg.Bilevel(noisy, judged), hg.Unrolled(hg.SGD(0.1), 3, tape=tape)
        state, estimate = estimator.init(losses, params, hparams), compile(estimator.estimate, **TRACED)
        if tape == hg.Full():
            assert torch.isfinite(estimate(losses, state, hparams, train, val).hypergradient["noise"])
        else:
            with pytest.raises(errors.UnsupportedOpError, match="draws at random"):
                estimate(losses, state, hparams, train, val)


class TestWhatIsHeld:
    """A program is made anew where something has changed that its functions hold."""

    def compiled_and_eager(self, problem_of, estimator_of, change):
        params, hparams, (train, *_), val = problem(torch.float64)
        losses, estimator = problem_of(), estimator_of(params)
        estimate, state = compile(estimator.estimate, **TRACED), estimator.init(losses, params, hparams)
        found = []
        for _ in range(2):
            mine = estimate(losses, state, hparams, train, val).hypergradient
            plain = estimator.estimate(losses, state, hparams, train, val).hypergradient
            close(mine, plain, 1e-6)
            found.append(mine)
            change()
        first, second = (torch.cat([x.reshape(-1) for x in tree.values()]) for tree in found)
        assert not torch.allclose(first, second, rtol=1e-3)

    def test_the_options_of_an_optimiser(self):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
        change = lambda: optimizer.param_groups[0].update(lr=0.01)  # noqa: E731
        self.compiled_and_eager(lambda: PROBLEM, lambda params: hg.Greedy(optimizer), change)

    def test_a_number_and_the_mode_of_a_module(self):
        held, module = {"weight": 1.0}, torch.nn.Dropout(0.5)

        def loss(params, hparams, batch):
            value = held["weight"] * trained(params, hparams, batch)
            return value if module.training else 2 * value

        def change():
            module.eval()

        of = lambda: hg.Bilevel(loss, judged)  # noqa: E731
        self.compiled_and_eager(of, lambda params: hg.Greedy(hg.SGD(0.1)), change)
        self.compiled_and_eager(of, lambda params: hg.Greedy(hg.SGD(0.1)), lambda: held.update(weight=3.0))

    def test_a_number_that_comes_to_equal_another(self):
        held = {"first": 1, "second": 1, "third": 2}

        def loss(params, hparams, batch):
            return (held["first"] + 10 * held["second"]) * trained(params, hparams, batch)

        of = lambda: hg.Bilevel(loss, judged)  # noqa: E731
        self.compiled_and_eager(of, lambda params: hg.Greedy(hg.SGD(0.001)), lambda: held.update(second=2))
