"""Problems whose solutions and derivatives are known."""

import numpy as np

import hypergrad as hg
from support.arrays import arrays
from support.differences import central


class Logistic:
    """Logistic regression with a penalty for each feature, in NumPy: optimum, derivatives, hypergradient."""

    def __init__(self, n=6, count=30, seed=0):
        rng = np.random.default_rng(seed)
        self.x, self.xv = rng.normal(size=(count, n)), rng.normal(size=(count, n))
        truth = rng.normal(size=n)
        self.y, self.yv = (np.sign(x @ truth + rng.normal(size=count)) for x in (self.x, self.xv))
        self.lam = np.exp(rng.normal(size=n) - 1)

    def slope(self, theta, lam):
        s = 1 / (1 + np.exp(self.y * (self.x @ theta)))
        return -self.x.T @ (self.y * s) + lam * theta

    def hessian(self, theta, lam):
        s = 1 / (1 + np.exp(self.y * (self.x @ theta)))
        return self.x.T @ ((s * (1 - s))[:, None] * self.x) + np.diag(lam)

    def optimum(self, lam):
        theta = np.zeros(len(lam))
        for _ in range(50):
            theta = theta - np.linalg.solve(self.hessian(theta, lam), self.slope(theta, lam))
        return theta

    def outer(self, theta):
        return np.sum(np.log1p(np.exp(-self.yv * (self.xv @ theta))))

    def outer_slope(self, theta):
        return -self.xv.T @ (self.yv / (1 + np.exp(self.yv * (self.xv @ theta))))

    def hypergradient(self, theta, lam):
        return -theta * np.linalg.solve(self.hessian(theta, lam), self.outer_slope(theta))

    def problem(self, backend):
        xp = backend.xp

        def outer(p, h, b):
            return xp.sum(xp.log1p(xp.exp(-b[1] * (b[0] @ p))))

        return hg.Bilevel(lambda p, h, b: outer(p, h, b) + 0.5 * xp.sum(h * p * p), outer)

    def data(self, backend):
        return arrays(backend, self.x, self.y), arrays(backend, self.xv, self.yv)


def equilibrium(backend, n=5, seed=0):
    """θ = tanh(W θ + s u), an equilibrium layer with a W that is not symmetric; its fixed point, and F(λ)."""
    rng = np.random.default_rng(seed)
    w, u, y = 0.3 * rng.normal(size=(n, n)), rng.normal(size=n), rng.normal(size=n)
    lam = np.concatenate([w.ravel(), [0.7]])

    def split(lam):
        return lam[: n * n].reshape(n, n), lam[n * n]

    def settle(lam):
        w, s = split(lam)
        theta = np.zeros(n)
        for _ in range(200):
            theta = np.tanh(w @ theta + s * u)
        return theta

    def cost(lam):
        return 0.5 * np.sum((settle(lam) - y) ** 2)

    problem = hg.FixedPoint(
        lambda p, h, b: backend.xp.tanh(h["w"] @ p + h["s"] * b),
        lambda p, h, b: 0.5 * backend.xp.sum((p - b) ** 2),
    )
    hparams = {"s": backend.asarray(lam[-1]), "w": backend.asarray(w)}
    exact = central(cost, lam)
    # Trees come sorted by key: s first.
    return problem, settle(lam), hparams, backend.asarray(u), backend.asarray(y), np.roll(exact, 1)
