"""The rows of ``cost.py`` for PyTorch."""

from dataclasses import replace

import hypergrad_torch
import torch
from hypergrad_torch import ModuleTuner
from torch import nn

import hypergrad as hg
from benchmarks.costs.nets import IN, OUT
from benchmarks.costs.nets.in_torch import batch_of, logits, outer, parameters, with_l2, with_many, with_noise
from benchmarks.costs.row import Row
from benchmarks.shared.timing import Program

UNROLL, PRODUCTS, PERIOD = 10, 10, 10


def rows(width: int, size: int, compiled: bool) -> list[Row]:
    torch.manual_seed(0)
    params, train, val = parameters(width), batch_of(size), batch_of(size)
    l2, noise = torch.full((4,), -6.0), torch.full((4,), 0.1)

    def gradient(loss, hparams) -> Program:
        variables = {name: p.clone().requires_grad_() for name, p in params.items()}
        return lambda: torch.autograd.grad(loss(variables, hparams, train), list(variables.values()))

    def estimate(loss, hparams, estimator, batches=train) -> Program:
        problem = hg.Bilevel(loss, outer)
        state = estimator.init(problem, params, hparams)
        return lambda: estimator.estimate(problem, state, hparams, batches, val)

    def by_hand() -> Program:
        """The same step in torch alone, without a check or a report: what eager torch can do."""
        theta = {name: p.clone().requires_grad_() for name, p in params.items()}
        lam = l2.clone().requires_grad_()

        def step():
            g = torch.autograd.grad(with_l2(theta, lam, train), list(theta.values()), create_graph=True)
            pairs = zip(theta.items(), g, strict=True)
            new = {k: torch.add(p.detach(), x.detach(), alpha=-0.01).requires_grad_() for (k, p), x in pairs}
            v = torch.autograd.grad(outer(new, lam, val), list(new.values()))
            return torch.autograd.grad(g, lam, [-0.01 * x for x in v])

        return step

    def judge(model, lam, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def train_loss(model, lam, batch):
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        penalty = sum(s * torch.sum(layer.weight**2) for s, layer in zip(torch.exp(lam), layers, strict=True))
        return judge(model, lam, batch) + penalty

    def module():
        net = nn.Sequential(
            nn.Linear(IN, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, OUT),
        )  # fmt: skip
        return net, torch.optim.SGD(net.parameters(), 0.01), torch.full((4,), -6.0, requires_grad=True)

    def own_loop() -> Program:
        net, optimizer, lam = module()

        def step():
            optimizer.zero_grad()
            train_loss(net, lam.detach(), train).backward()
            optimizer.step()

        return step

    def tuned(every) -> Program:
        net, optimizer, lam = module()
        hyper = torch.optim.Adam([lam], 1e-2)
        losses = {"inner": train_loss, "outer": judge}
        tuner = ModuleTuner(net, optimizer, lam, **losses, hyper_update=hyper, every=every)
        return lambda: [tuner.step(train, val) for _ in range(every)]

    g_l2, g_noise = gradient(with_l2, l2), gradient(with_noise, noise)
    greedy = hg.Greedy(hg.SGD(0.01))
    loop = own_loop()
    step_l2, step_noise = estimate(with_l2, l2, greedy), estimate(with_noise, noise, greedy)

    def now_and_then(g, step) -> Program:
        return lambda: [step() if k == 0 else g() for k in range(PERIOD)]

    shapes = {"1": (), "10³": (width,), "10⁶": (width, width)}
    strengths = {n: torch.full(shape, -6.0) for n, shape in shapes.items()}
    many = {n: estimate(with_many, h, greedy) for n, h in strengths.items()}
    neumann = hg.Implicit(hg.Neumann(PRODUCTS - 1, step_size=1e-3), checks=hg.Checks(away="ignore"))
    gauss_newton = replace(
        neumann,
        products=hg.GaussNewton(
            lambda p, h, b: logits(p, b[0], h), lambda f, h, b: nn.functional.cross_entropy(f, b[1])
        ),
    )
    batches = [train] * UNROLL
    full = estimate(with_noise, noise, hg.Unrolled(hg.SGD(0.01), UNROLL), batches)
    states = estimate(with_noise, noise, hg.Unrolled(hg.SGD(0.01), UNROLL, tape=hg.States()), batches)
    heavy = hg.SGD(0.01, momentum=0.9)
    reversible = estimate(with_noise, noise, hg.Unrolled(heavy, UNROLL, tape=hg.Reversible()), batches)
    forward = estimate(with_noise, noise, hg.Forward(hg.SGD(0.01), UNROLL), batches)
    simple = hg.Greedy(hg.SGD(0.01), products=hg.FiniteDifference(sides=1, estimate_error=False))

    def program(loss, hparams) -> Program:
        problem, state = hg.Bilevel(loss, outer), greedy.init(hg.Bilevel(loss, outer), params, hparams)
        run = hypergrad_torch.compile(greedy.estimate)
        return lambda: run(problem, state, hparams, train, val)

    more = [
        Row("Greedy, L2, whole step, compiled", program(with_l2, l2), g_l2, seconds=1.6, counted=False),
        Row(
            "Greedy, noise, whole step, compiled",
            program(with_noise, noise),
            g_noise,
            seconds=3.4,
            counted=False,
        ),
    ]
    return (more if compiled else []) + [
        Row("Greedy, L2, extra over the training gradient", step_l2, g_l2, less=1, flops=1.02),
        Row("Greedy, noise, extra", step_noise, g_noise, less=1, flops=2.38),
        Row(
            "Greedy, noise by a one-sided difference, extra",
            estimate(with_noise, noise, simple),
            g_noise,
            less=1,
            flops=1.75,
        ),
        Row("Greedy, L2, whole step", step_l2, g_l2, seconds=2.05),
        Row("  the same in torch by hand, without checks", by_hand(), g_l2),
        Row("Greedy, noise, whole step", step_noise, g_noise, seconds=3.5),
        Row(
            "Greedy, L2, 1 update in 10 steps, extra", now_and_then(g_l2, step_l2), g_l2, PERIOD, PERIOD, 0.11
        ),
        Row(
            "Greedy, noise, 1 update in 10 steps, extra",
            now_and_then(g_noise, step_noise),
            g_noise,
            PERIOD,
            PERIOD,
            0.24,
        ),
        Row("Greedy, 10³ penalties against 1", many["10³"], many["1"], seconds=1.05),
        Row("Greedy, 10⁶ penalties against 1", many["10⁶"], many["1"], seconds=1.05),
        Row("ModuleTuner, L2, every=1, against one's own loop", tuned(1), loop),
        Row("ModuleTuner, L2, every=10, against one's own loop", tuned(PERIOD), loop, PERIOD),
        Row(
            f"Implicit, K = {PRODUCTS} products, per 2 + 1.9 K",
            estimate(with_noise, noise, neumann),
            g_noise,
            per=2 + 1.9 * PRODUCTS,
            flops=1.0,
        ),
        Row(
            f"Implicit, Gauss-Newton, K = {PRODUCTS}, and its mixed term, per 3.9 + 1.75 K",
            estimate(with_noise, noise, gauss_newton),
            g_noise,
            per=3.9 + 1.75 * PRODUCTS,
            flops=1.0,
        ),
        Row(f"Unrolled, Full, T = {UNROLL}, a step", full, g_noise, UNROLL, 1, flops=3.0),
        Row(f"Unrolled, States, T = {UNROLL}, a step", states, g_noise, UNROLL, 1, flops=4.05),
        Row(f"Unrolled, Reversible, T = {UNROLL}, a step", reversible, g_noise, UNROLL, 1, flops=4.3),
        Row("Forward, 4 hyperparameters, per (1 + 2·4) T", forward, g_noise, 9 * UNROLL, 1, flops=1.0),
    ]
