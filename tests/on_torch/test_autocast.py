"""Autocast around an estimate holds inside of the losses, and nowhere else: bit for bit."""

import pytest

import hypergrad as hg

torch = pytest.importorskip("torch")

_draw = torch.Generator().manual_seed(3)
X, Y, A, B = (torch.randn(*s, generator=_draw) for s in ((64, 8), (64, 1), (8, 8), (8, 1)))
PARAMS, LAM = {"a": 0.3 * A, "b": 0.3 * B}, torch.tensor(-2.0)


def implicit(solver):
    return hg.Implicit(hg.Damped(solver, 3.0), checks=hg.Checks(away="ignore"))


ESTIMATORS = {
    "greedy": hg.Greedy(hg.SGD(0.1)),
    "differences": hg.Greedy(hg.SGD(0.1), products=hg.FiniteDifference(tolerance=10.0)),
    "full": hg.Unrolled(hg.Adam(0.01), 4),
    "states": hg.Unrolled(hg.SGD(0.1, momentum=0.9), 4, tape=hg.States()),
    "cg": implicit(hg.CG(rtol=1e-2)),
    "minres": implicit(hg.MINRES(rtol=1e-2)),
    "gmres": implicit(hg.GMRES(rtol=1e-2)),
    "direct": implicit(hg.Direct(rtol=1e-2)),
}


def judged(p, h, b):
    return ((torch.tanh(b[0] @ p["a"]) @ p["b"] - b[1]) ** 2).float().mean()


def trained(p, h, b):
    return judged(p, h, b) + h.exp() * sum((w**2).sum() for w in p.values())


def cast(loss):
    def run(p, h, b):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(p, h, b)

    return run


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_it_holds_in_the_losses_alone(estimator):
    def run(problem):
        state = estimator.init(problem, PARAMS, LAM)
        out = estimator.estimate(problem, state, LAM, lambda t: (X, Y), (X, Y))
        return out.hypergradient, *out.state.params.values()

    inside = run(hg.Bilevel(cast(trained), cast(judged)))
    with torch.autocast("cpu", torch.bfloat16):
        around = run(hg.Bilevel(trained, judged))
        assert torch.is_autocast_enabled("cpu")
    plain = run(hg.Bilevel(trained, judged))
    assert all(map(torch.equal, around, inside))
    assert not torch.equal(around[0], plain[0]) and around[0].dtype is torch.float32
