"""Losses whose backward pass may not be the derivative of the forward one: right, or refused by name."""

import pytest

import hypergrad as hg
from hypergrad import errors

torch = pytest.importorskip("torch")
from hypergrad_torch import ModuleTuner, checkpoint_context  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

RATE, STEPS = 0.3, 3
_draw = torch.Generator().manual_seed(3)
X, XV = (torch.randn(n, 3, generator=_draw, dtype=torch.float64) for n in (8, 6))
Y, YV = X.sin().sum(1), XV.sin().sum(1)
LAM = torch.tensor(-2.0, dtype=torch.float64)
ESTIMATORS = {
    "greedy": (1, lambda: hg.Greedy(hg.SGD(RATE))),
    "full": (STEPS, lambda: hg.Unrolled(hg.SGD(RATE), STEPS)),
    "states": (STEPS, lambda: hg.Unrolled(hg.SGD(RATE), STEPS, tape=hg.States())),
}
each_estimator = pytest.mark.parametrize("steps, estimator", ESTIMATORS.values(), ids=ESTIMATORS)


def net(middle=nn.Tanh):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), middle(), nn.Linear(4, 1)).double()


def losses(run):
    """A penalised mean square of ``run(params, x)``, judged by the mean square."""

    def judged(params, hparams, batch):
        return ((run(params, batch[0]).squeeze(-1) - batch[1]) ** 2).mean()

    def trained(params, hparams, batch):
        return judged(params, hparams, batch) + hparams.exp() * sum((w**2).sum() for w in params.values())

    return hg.Bilevel(trained, judged)


def of(module):
    return losses(lambda params, x: functional_call(module, params, (x,)))


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def hypergradient(problem, params, estimator):
    return hg.hypergradient(problem, params, LAM, lambda t: (X, Y), (XV, YV), estimator)


def by_hand(problem, params, steps):
    """The derivative of C2 through so many steps of gradient descent, by one double backward pass."""
    lam = LAM.clone().requires_grad_()
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    for _ in range(steps):
        loss = problem.inner(params, lam, (X, Y))
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {k: p - RATE * g for (k, p), g in zip(params.items(), gradients, strict=True)}
    return torch.autograd.grad(problem.outer(params, lam, (XV, YV)), lam)[0]


class SavedIntermediate(torch.autograd.Function):
    """x σ(x), which saves σ(x): that has no graph in backward."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * (s + x * s * (1 - s))


class KeptOnContext(torch.autograd.Function):
    """tanh, which keeps its result on ctx."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = x.tanh()
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.y**2)


class Reversal(torch.autograd.Function):
    """The identity, with the negative gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class StraightThrough(torch.autograd.Function):
    """Rounding, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, g):
        return g


class Masked(torch.autograd.Function):
    """x² where x > 0, which saves a mask: neither input nor output, and a constant indeed."""

    @staticmethod
    def forward(ctx, x):
        mask = (x > 0).to(x)
        ctx.save_for_backward(x, mask)
        return mask * x**2

    @staticmethod
    def backward(ctx, g):
        x, mask = ctx.saved_tensors
        return g * mask * 2 * x


class FromOutput(torch.autograd.Function):
    """tanh, which saves its output."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)


def with_function(function):
    class Layer(nn.Module):
        def forward(self, x):
            return function.apply(x)

    return net(Layer)


@each_estimator
class TestCustomFunctions:
    @pytest.mark.parametrize("function", [SavedIntermediate, KeptOnContext, Reversal, StraightThrough])
    def test_a_wrong_one_is_named(self, steps, estimator, function):
        module = with_function(function)
        with pytest.raises(errors.UnsupportedOpError, match=function.__name__):
            hypergradient(of(module), values(module), estimator())

    @pytest.mark.parametrize("function, plain", [(Masked, lambda x: x.relu() ** 2), (FromOutput, torch.tanh)])
    def test_a_right_one_is_used(self, steps, estimator, function, plain):
        class Plain(nn.Module):
            def forward(self, x):
                return plain(x)

        module, params = with_function(function), values(net())
        expected = by_hand(of(net(Plain)), params, steps)
        got = hypergradient(of(module), params, estimator())
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)

    def test_single_precision_is_compared_too(self, steps, estimator):
        right, wrong = with_function(FromOutput), with_function(SavedIntermediate)
        single = lambda *xs: tuple(x.float() for x in xs)  # noqa: E731
        run = lambda m: hg.hypergradient(  # noqa: E731
            of(m.float()), values(m), LAM.float(), lambda t: single(X, Y), single(XV, YV), estimator()
        )
        assert torch.isfinite(run(right))
        with pytest.raises(errors.UnsupportedOpError, match="SavedIntermediate"):
            run(wrong)

    def test_a_right_one_beside_a_steep_step_is_not_blamed(self, steps, estimator):
        """In single precision the differences are too wide for the step, and shrink until they see it."""
        plain = of(with_function(FromOutput).float())

        def inner(params, hparams, batch):
            return (
                plain.inner(params, hparams, batch)
                + torch.sigmoid(3e4 * (params["0.bias"][0] - at)) * 4 / 3e4
            )

        params = {name: p.float() for name, p in values(net()).items()}
        at, single = params["0.bias"][0].clone(), lambda *xs: tuple(x.float() for x in xs)
        problem = hg.Bilevel(inner, plain.outer)
        data = single(X, Y), single(XV, YV)
        assert torch.isfinite(
            hg.hypergradient(problem, params, LAM.float(), lambda t: data[0], data[1], estimator())
        )

    @pytest.mark.parametrize("function, right", [(FromOutput, True), (SavedIntermediate, False)])
    def test_of_a_large_loss_the_rounding_is_not_blamed(self, steps, estimator, function, right):
        """Differences of a large loss round by more than a small gradient would allow."""

        def accepted(constant):
            fresh = type(function.__name__, (function,), {})  # not trusted yet
            plain = of(with_function(fresh))
            problem = hg.Bilevel(lambda *given: constant + plain.inner(*given), plain.outer)
            try:
                return torch.isfinite(hypergradient(problem, values(net()), estimator()))
            except errors.UnsupportedOpError:
                return False

        assert [accepted(1e4 * k) for k in range(1, 21)] == [right] * 20

    def test_under_autocast_it_is_compared_without(self, steps, estimator):
        wrong = with_function(SavedIntermediate).float()
        single = lambda *xs: tuple(x.float() for x in xs)  # noqa: E731
        for _ in range(2):  # noise of bfloat16 must not pass for agreement, and be trusted
            with (
                torch.autocast("cpu", torch.bfloat16),
                pytest.raises(errors.UnsupportedOpError, match="Saved"),
            ):
                hg.hypergradient(
                    of(wrong), values(wrong), LAM.float(), lambda t: single(X, Y), single(XV, YV), estimator()
                )

    def test_half_precision_needs_trust_from_single(self, steps, estimator):
        fresh = type("Fresh", (FromOutput,), {})  # not trusted yet
        module = with_function(fresh)

        def run(dtype):
            made = module.to(dtype)
            data = [tuple(x.to(dtype) for x in pair) for pair in ((X, Y), (XV, YV))]
            given = of(made), values(made), LAM.to(dtype), lambda t: data[0], data[1]
            return hg.hypergradient(*given, estimator())

        with pytest.raises(errors.UnsupportedOpError, match="too coarse to judge .* Fresh"):
            run(torch.bfloat16)
        expected = run(torch.float32)
        torch.testing.assert_close(run(torch.bfloat16).float(), expected, rtol=0.2, atol=0)


@each_estimator
class TestHooks:
    HOOKS = {
        "full": lambda m: m.register_full_backward_hook(lambda m, after, before: (0.5 * after[0],)),
        "before": lambda m: m.register_full_backward_pre_hook(lambda m, before: (0.5 * before[0],)),
        "of-a-tensor": lambda m: m.register_forward_hook(
            lambda m, x, y: y.register_hook(lambda g: 0.5 * g) and None
        ),
        "clipping": lambda m: m.register_forward_hook(
            lambda m, x, y: y.register_hook(lambda g: g.clamp(-1e-3, 1e-3)) and None
        ),
    }

    @pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
    def test_one_that_changes_a_gradient_is_refused(self, steps, estimator, hook):
        module = net()
        hook(module[1])
        with pytest.raises(errors.UnsupportedOpError, match="hook of a"):
            hypergradient(of(module), values(module), estimator())

    def test_those_that_look_are_called(self, steps, estimator):
        module, seen = net(), []
        module[1].register_full_backward_hook(lambda m, after, before: seen.append("full"))
        module[1].register_full_backward_pre_hook(lambda m, before: seen.append("before"))
        module[1].register_forward_hook(lambda m, x, y: y.register_hook(lambda g: seen.append("t")) and None)
        got = hypergradient(of(module), values(module), estimator())
        torch.testing.assert_close(got, by_hand(of(net()), values(net()), steps), rtol=1e-12, atol=0)
        assert set(seen) == {"full", "before", "t"}

    def test_hooks_outside_of_an_estimate_are_their_owners_business(self, steps, estimator):
        x = torch.ones(2, requires_grad=True)
        y = 3 * x
        y.register_hook(lambda g: 0.5 * g)
        y.sum().backward()
        assert x.grad.tolist() == [1.5, 1.5]


class Checkpointed(nn.Module):
    """A net whose first two layers run again in the backward pass."""

    def __init__(self, again=True):
        super().__init__()
        self.net, self.options = net(), {}
        if again:
            self.options = {"context_fn": checkpoint_context(self.net[:2])}

    def forward(self, x):
        return self.net[2](checkpoint(self.net[:2], x, use_reentrant=False, **self.options))


class TestCheckpoints:
    @each_estimator
    def test_a_block_with_its_context_is_right(self, steps, estimator):
        module = Checkpointed()
        expected = by_hand(of(net()), values(net()), steps)
        got = hypergradient(of(module), values(module), estimator())
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)

    WAYS = {
        "module": lambda block, x: checkpoint(block, x, use_reentrant=False),
        "method": lambda block, x: checkpoint(block.forward, x, use_reentrant=False),
        "closure": lambda block, x: checkpoint(lambda x: block(x), x, use_reentrant=False),
        "argument": lambda block, x: checkpoint(lambda f, x: f(x), block, x, use_reentrant=False),
    }

    @each_estimator
    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_a_block_without_is_refused(self, steps, estimator, way):
        class Again(Checkpointed):
            def forward(self, x):
                return self.net[2](way(self.net[:2], x))

        module = Again()
        with pytest.raises(errors.UnsupportedOpError, match="checkpoint_context"):
            hypergradient(of(module), values(module), estimator())

    @each_estimator
    def test_a_block_of_arguments_is_right(self, steps, estimator):
        def hidden(x, w, b):
            return torch.tanh(x @ w.T + b)

        def run(params, x):
            h = checkpoint(hidden, x, params["0.weight"], params["0.bias"], use_reentrant=False)
            return h @ params["2.weight"].T + params["2.bias"]

        expected = by_hand(of(net()), values(net()), steps)
        got = hypergradient(losses(run), values(net()), estimator())
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("steps", [1, STEPS])
    def test_a_module_in_training_is_tuned_as_without(self, steps):
        def tuned(module):
            lam = LAM.clone()
            optimizer = torch.optim.SGD(module.parameters(), RATE)
            estimator = hg.Greedy(optimizer) if steps == 1 else hg.Unrolled(optimizer, steps)
            tuner = ModuleTuner(
                module,
                optimizer,
                {"l2": lam},
                inner=lambda m, h, b: (
                    trained(m, b) + h["l2"].exp() * sum((p**2).sum() for p in m.parameters())
                ),
                outer=lambda m, h, b: trained(m, b),
                hyper_update=torch.optim.SGD([lam], 0.0),
                every=steps,
                estimator=estimator,
            )
            for _ in range(steps):
                done = tuner.step((X, Y), (XV, YV))
            return done.estimate.hypergradient["l2"], values(module)

        def squares(module):
            return sum((p**2).sum() for p in module.parameters())

        def trained(module, batch):
            return ((module(batch[0]).squeeze(-1) - batch[1]) ** 2).mean()

        got, after = tuned(Checkpointed())
        expected, plain = tuned(net())
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        for p, q in zip(after.values(), plain.values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=0)

    def test_what_is_no_module_is_refused(self):
        with pytest.raises(errors.ArgumentError, match="checkpoint_context"):
            checkpoint_context([nn.Linear(1, 1)])


@each_estimator
def test_an_embedding_scaled_by_frequency_is_refused(steps, estimator):
    table = nn.Embedding(4, 1, scale_grad_by_freq=True).double()
    indices = torch.tensor([0, 1, 1, 2, 1, 3, 0, 1])
    problem = losses(lambda params, x: functional_call(table, params, (indices[: len(x)],)).sin())
    with pytest.raises(errors.UnsupportedOpError, match="scale_grad_by_freq"):
        hypergradient(problem, values(table), estimator())
