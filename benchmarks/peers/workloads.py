"""The workloads that all libraries are given, in NumPy, and what is right for each in float64.

Two kinds. *Training*: T steps of SGD with momentum on a tanh MLP with an L2 strength for each layer; the
witness is HIPS autograd through the same steps in float64, by none of the libraries compared. *Implicit*: a
linear or logistic regression with a penalty for each feature at its optimum,

    C̃1 = ℓ(X θ) + ½ Σ exp(λ_i) θ_i²,    C2 = ℓ(X₂ θ)/m₂,    dC2/dλ_i = −exp(λ_i) θ_i x_i,    H x = ∇C2

whose witness is that closed form with H written out and factored.
"""

from dataclasses import dataclass, field
from typing import Any

import autograd
import autograd.numpy as np
import numpy

from benchmarks.shared.networks import squares

RATE, MOMENTUM, BATCH, IN, OUT = 0.05, 0.9, 100, 784, 10
LAYERS = 3
PRESETS = {
    "smoke": {"width": 32, "steps": 3, "unknowns": 40, "repeats": 2},
    "small": {"width": 384, "steps": 20, "unknowns": 200, "repeats": 15},
}


@dataclass(frozen=True)
class Workload:
    """A problem in numbers. ``exact`` is the hypergradient, or None where there is none to be had."""

    key: str
    title: str
    loss: str
    params: Any
    hparams: numpy.ndarray
    train: tuple[numpy.ndarray, numpy.ndarray]
    val: tuple[numpy.ndarray, numpy.ndarray]
    exact: numpy.ndarray | None
    steps: int = 0
    momentum: float = 0.0
    timed: bool = True
    penalised: numpy.ndarray | None = None
    note: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def implicit(self) -> bool:
        return self.steps == 0


def error(found: Any, exact: numpy.ndarray) -> float:
    """Relative, in the Euclidean norm."""
    found = numpy.asarray(found, numpy.float64)
    return float(numpy.linalg.norm(found - exact) / numpy.linalg.norm(exact))


def workloads(preset: str, seed: int = 0) -> list[Workload]:
    size = PRESETS[preset]
    n = size["unknowns"]
    return [
        training(
            "unroll", f"T = {size['steps']} steps unrolled", size["width"], size["steps"], MOMENTUM, seed
        ),
        training("greedy", "one greedy step", size["width"], 1, 0.0, seed),
        regression("ridge", "ridge, κ = 10", "squares", 10.0, n, seed),
        regression("ridge-1e3", "ridge, κ = 1000", "squares", 1e3, n, seed),
        regression("logistic", "logistic, κ ≈ 20", "logistic", 10.0, n, seed),
        regression("logistic-1e3", "logistic, κ ≈ 1500", "logistic", 1e3, n, seed),
        regression("ridge-1e8", "ridge, κ = 10⁸", "squares", 1e8, n, seed, timed=False),
        singular(n, seed),
        saddle(n, seed),
    ]


# Training


def mlp(np_: Any, params: dict[str, Any], x: Any) -> Any:
    """The network, in any framework's words: ``np_`` has tanh."""
    for k in range(LAYERS):
        x = x @ params[f"w{k}"] + params[f"b{k}"]
        x = np_.tanh(x) if k < LAYERS - 1 else x
    return x


def training(key: str, title: str, width: int, steps: int, momentum: float, seed: int) -> Workload:
    rng = numpy.random.default_rng(seed)
    sizes = [IN, *[width] * (LAYERS - 1), OUT]
    params = {}
    for k in range(LAYERS):
        scale = 1 / numpy.sqrt(sizes[k])
        params[f"w{k}"] = (scale * rng.normal(size=(sizes[k], sizes[k + 1]))).astype(numpy.float32)
        params[f"b{k}"] = numpy.zeros(sizes[k + 1], numpy.float32)
    teacher = rng.normal(size=(IN, OUT)) / numpy.sqrt(IN)

    def batch() -> tuple[numpy.ndarray, numpy.ndarray]:
        x = rng.normal(size=(BATCH, IN))
        y = (x @ teacher + 0.5 * rng.normal(size=(BATCH, OUT))).argmax(1)
        return x.astype(numpy.float32), y

    hparams = numpy.array([-6.0, -5.5, -5.0], numpy.float32)
    train, val = batch(), batch()
    exact = unrolled_in_float64(params, hparams, train, val, steps, momentum)
    return Workload(key, title, "mlp", params, hparams, train, val, exact, steps, momentum)


def unrolled_in_float64(params, hparams, train, val, steps, momentum) -> numpy.ndarray:
    """HIPS autograd through the whole of training."""
    start = {name: p.astype(numpy.float64) for name, p in params.items()}

    def loss(params, batch):
        x, y = batch[0].astype(numpy.float64), batch[1]
        out = mlp(np, params, x)
        top = np.max(out, 1)
        return np.mean(np.log(np.sum(np.exp(out - top[:, None]), 1)) + top - out[np.arange(len(y)), y])

    def inner(params, log_l2):
        return loss(params, train) + squares(np, params, log_l2)

    def final(log_l2):
        theta, velocity = start, {name: 0.0 for name in start}
        for _ in range(steps):
            slope = autograd.grad(inner)(theta, log_l2)
            velocity = {name: momentum * velocity[name] + slope[name] for name in start}
            theta = {name: theta[name] - RATE * velocity[name] for name in start}
        return loss(theta, val)

    return autograd.grad(final)(hparams.astype(numpy.float64))


# Implicit


def spread(m: int, n: int, largest: float, smallest: float, rng: Any) -> numpy.ndarray:
    """A data matrix with the eigenvalues of XᵀX even on a logarithmic scale."""
    u = numpy.linalg.qr(rng.normal(size=(m, n)))[0]
    v = numpy.linalg.qr(rng.normal(size=(n, n)))[0]
    return (u * numpy.sqrt(numpy.geomspace(largest, smallest, n))) @ v.T


def regression(
    key: str, title: str, loss: str, kappa: float, n: int, seed: int, timed: bool = True
) -> Workload:
    rng = numpy.random.default_rng(seed)
    m = 5 * n
    curvature = 1.0 if loss == "squares" else 0.2
    x = spread(m, n, 1 / curvature, 0.8 / kappa / curvature, rng)
    x2 = spread(m, n, m / curvature, 0.8 * m / kappa / curvature, rng)
    truth = rng.normal(size=n)
    if loss == "squares":
        y, y2 = (a @ truth + 0.1 * rng.normal(size=m) * numpy.std(a @ truth) for a in (x, x2))
    else:
        y, y2 = (numpy.sign(a @ truth + 0.3 * numpy.std(a @ truth) * rng.normal(size=m)) for a in (x, x2))
    log_l2 = numpy.log(0.2 / kappa) + rng.uniform(-1, 0, size=n)
    theta = optimum(loss, x, y, log_l2)
    hessian = hessian_of(loss, theta, x, log_l2)
    exact = -numpy.exp(log_l2) * theta * numpy.linalg.solve(hessian, outer_slope(loss, theta, x2, y2))
    seen = float(numpy.linalg.cond(hessian))
    about = {"unknowns": n, "examples": m, "kappa": seen}
    return Workload(key, title, loss, theta, log_l2, (x, y), (x2, y2), exact, timed=timed, about=about)


def singular(n: int, seed: int) -> Workload:
    """Features that occur twice on T1 and not on T2, and half of them unpenalised: many optima, and dC2/dλ
    is not defined, since ∇C2 has a part in the null space of H.
    """
    rng = numpy.random.default_rng(seed)
    m = 5 * n
    half = spread(m, n - 4, 1.0, 0.1, rng)
    x = numpy.concatenate([half, half[:, :4]], 1)
    x2 = spread(m, n, m, 0.1 * m, rng)
    truth = rng.normal(size=n)
    y, y2 = x @ truth + 0.1 * rng.normal(size=m), x2 @ truth
    penalised = numpy.ones(n)
    penalised[:4] = penalised[-4:] = 0.0
    log_l2 = numpy.full(n, numpy.log(0.1))
    hessian = x.T @ x + numpy.diag(penalised * numpy.exp(log_l2))
    theta = numpy.linalg.lstsq(hessian, x.T @ y, rcond=1e-12)[0]
    return Workload(
        "singular", "ridge, singular H", "squares", theta, log_l2, (x, y), (x2, y2), None,
        timed=False, penalised=penalised, note="dC2/dλ is not defined",
    )  # fmt: skip


def saddle(n: int, seed: int) -> Workload:
    """Four features that are unpenalised and count negatively: a stationary point that is no minimum. The
    system has a solution, which the closed form gives, and no training would come to rest here.
    """
    rng = numpy.random.default_rng(seed)
    m = 5 * n
    x, x2 = spread(m, n, 1.0, 0.1, rng), spread(m, n, m, 0.1 * m, rng)
    truth = rng.normal(size=n)
    y, y2 = x @ truth + 0.1 * rng.normal(size=m), x2 @ truth
    penalised = numpy.ones(n)
    penalised[:4] = -40.0
    log_l2 = numpy.full(n, numpy.log(0.1))
    hessian = x.T @ x + numpy.diag(penalised * numpy.exp(log_l2))
    theta = numpy.linalg.solve(hessian, x.T @ y)
    v = outer_slope("squares", theta, x2, y2)
    exact = -penalised * numpy.exp(log_l2) * theta * numpy.linalg.solve(hessian, v)
    return Workload(
        "saddle", "ridge, a saddle", "squares", theta, log_l2, (x, y), (x2, y2), exact,
        timed=False, penalised=penalised, note="a stationary point that is no minimum",
    )  # fmt: skip


def sigmoid(z: numpy.ndarray) -> numpy.ndarray:
    return 0.5 * (1 + numpy.tanh(0.5 * z))


def hessian_of(loss: str, theta: numpy.ndarray, x: numpy.ndarray, log_l2: numpy.ndarray) -> numpy.ndarray:
    weights = numpy.ones(len(x))
    if loss == "logistic":
        p = sigmoid(x @ theta)
        weights = p * (1 - p)
    return x.T @ (weights[:, None] * x) + numpy.diag(numpy.exp(log_l2))


def outer_slope(loss: str, theta: numpy.ndarray, x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    z = x @ theta
    residual = z - y if loss == "squares" else -y * sigmoid(-y * z)
    return x.T @ residual / len(x)


def optimum(loss: str, x: numpy.ndarray, y: numpy.ndarray, log_l2: numpy.ndarray) -> numpy.ndarray:
    """θ with ∇C̃1 = 0 to rounding: one Newton step for squares, until it stands still for the log-loss."""
    theta = numpy.zeros(x.shape[1])
    for _ in range(1 if loss == "squares" else 50):
        slope = len(x) * outer_slope(loss, theta, x, y) + numpy.exp(log_l2) * theta
        theta = theta - numpy.linalg.solve(hessian_of(loss, theta, x, log_l2), slope)
    return theta
