"""Hypergradients on a blackboard: every formula of the subject, with all matrices written out.

Training minimises one cost over parameters θ, and hyperparameters λ shape that cost. We evaluate the
result by another cost, on data that is not used in training:

    C̃1(θ, λ)   the regularised training cost, on the training set T1       `inner`
    C2(θ, λ)    the validation cost, on the validation set T2               `outer`

The hypergradient is the derivative of the second through the first,

    dC2/dλ = ∂_λ C2 + (dθ/dλ)ᵀ ∇_θ C2.

The direct term ∂_λ C2 is one call of autodiff (and mostly zero). The whole subject is dθ/dλ, a
matrix that is too large to store for any real network. Each method below is a way to do without it,
or a decision about which part of it to keep. Here θ has a handful of entries, so we do what one does
on a blackboard: write the Jacobians down and multiply.

Everything is a flat vector: theta (n,), lam (m,). A cost is a function (theta, lam, batch) -> scalar
written with `autograd.numpy`. Every estimator returns dC2/dλ, shape (m,).

Equations are numbered as in Luketina, Berglund, Greff and Raiko, "Scalable Gradient-Based Tuning of
Continuous Regularization Hyperparameters" (ICML 2016), called T1−T2. A word on its signs: eq. 2
is printed with a plus, but training descends, so here θ_{t+1} = θ_t − η ∇_θ C̃1. And the paper writes
the step λ − η₂ dC2/dλ where we write dC2/dλ; so the minus sign of our response term is a plus in its
eqs. 3, 4, 7.

Run this file to see the methods side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import autograd.numpy as np
from autograd import grad, jacobian
from numpy import float64
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[float64]
Matrix: TypeAlias = NDArray[float64]
Batch: TypeAlias = Any
Cost: TypeAlias = Callable[[Vector, Vector, Batch], float]  # (theta, lam, batch) -> scalar
UpdateMap: TypeAlias = Callable[[Vector, Vector, Batch, int], Vector]  # Φ(z, lam, batch, t) -> z
Hyper: TypeAlias = float | Callable[[Vector], float]  # a number, or a function of lam


# ── Notation ────────────────────────────────────────────────────────────────────────────────────────
# Why these five: everything below is made of two gradients and three Jacobians, so let each have the
# name it has in the equations. A cost that ignores λ has derivative zero; autograd would warn about it.


def derivative(operator: Any, f: Callable[..., Any], argument: int, *at: Any) -> Matrix:
    """Apply `grad` or `jacobian` to one argument of f; zero without a warning if f does not depend on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Output seems independent of input")
        D: Matrix = operator(f, argument)(*at)
        return D


def nabla_theta(C: Cost, theta: Vector, lam: Vector, batch: Batch) -> Vector:
    """∇_θ C, shape (n,)."""
    return derivative(grad, C, 0, theta, lam, batch)


def nabla_lam(C: Cost, theta: Vector, lam: Vector, batch: Batch) -> Vector:
    """∂_λ C, shape (m,): the direct derivative, with θ held fixed."""
    return derivative(grad, C, 1, theta, lam, batch)


def hessian(C: Cost, theta: Vector, lam: Vector, batch: Batch) -> Matrix:
    """H = ∇²_θ C, shape (n, n)."""
    return derivative(jacobian, lambda theta: nabla_theta(C, theta, lam, batch), 0, theta)


def mixed(C: Cost, theta: Vector, lam: Vector, batch: Batch) -> Matrix:
    """M = ∂²_λθ C = ∇_λ∇_θ C, shape (n, m): how the gradient changes with λ."""
    return derivative(jacobian, lambda lam: nabla_theta(C, theta, lam, batch), 0, lam)


# ── Training: eq. 1 and 2 ───────────────────────────────────────────────────────────────────────────
# Why: λ acts on θ through training and through nothing else, so we start with training.


def regularised_cost(cost: Cost, penalty: Callable[[Vector, Vector], float]) -> Cost:
    """Eq. 1: C̃1(θ | λ, T1) = C1(θ | λ, T1) + Ω(θ, λ)."""
    return lambda theta, lam, batch: cost(theta, lam, batch) + penalty(theta, lam)


def sgd_step(inner: Cost, theta: Vector, lam: Vector, batch: Batch, eta: float) -> Vector:
    """Eq. 2: θ_{t+1} = θ_t − η ∇_θ C̃1(θ_t | λ, T1), shape (n,)."""
    return theta - eta * nabla_theta(inner, theta, lam, batch)


# ── The greedy hypergradient: eq. 3 ─────────────────────────────────────────────────────────────────
# Why: the cheapest dθ/dλ. Pretend that θ_t does not depend on λ, and differentiate the last update alone:
# dθ_{t+1}/dλ = −η ∇_λ∇_θ C̃1. One mixed product a step, no Hessian, no history: T1−T2.


def greedy(
    inner: Cost,
    outer: Cost,
    theta: Vector,
    lam: Vector,
    train: Batch,
    val: Batch,
    eta: float,
    lookahead: bool = True,
) -> Vector:
    """∇_λ C2(θ_{t+1}(λ), λ) = ∂_λ C2 − η (∂²_λθ C̃1)ᵀ ∇_θ C2, the gradient behind eq. 3.

    The mixed derivative is taken at θ_t. Those of C2 are taken at θ_{t+1}, or at θ_t without `lookahead`,
    so that T1 and T2 can share a pass through the network.
    """
    after = sgd_step(inner, theta, lam, train, eta) if lookahead else theta
    v = nabla_theta(outer, after, lam, val)
    M = mixed(inner, theta, lam, train)
    return nabla_lam(outer, after, lam, val) - eta * M.T @ v


def greedy_literal(
    inner: Cost,
    outer: Cost,
    theta: Vector,
    lam: Vector,
    train: Batch,
    val: Batch,
    lookahead: bool = False,
    eta: float | None = None,
) -> Vector:
    """∂_λ C2 − (∇_θ C2)(∇_λ∇_θ C̃1): eq. 3 exactly as printed, with η₁ absorbed into the step size of λ.

    The authors' code evaluates ∇_θ C2 at θ_t. With `lookahead` it is evaluated at θ_{t+1}, as in their text;
    `eta` is used only to compute θ_{t+1}.
    """
    after = theta
    if lookahead:
        if eta is None:
            raise ValueError("greedy_literal: lookahead=True needs eta, to compute θ_{t+1}")
        after = sgd_step(inner, theta, lam, train, eta)
    v = nabla_theta(outer, after, lam, val)
    return nabla_lam(outer, after, lam, val) - mixed(inner, theta, lam, train).T @ v


# ── The implicit hypergradient: eq. 4 ───────────────────────────────────────────────────────────────
# Why: once training has converged, its history no longer matters. ∇_θ C̃1(θ(λ), λ) = 0 holds for every
# λ, so its derivative in λ is zero too: H dθ/dλ + M = 0. Solve for dθ/dλ, and forget how θ got there.


def implicit(
    inner: Cost, outer: Cost, theta: Vector, lam: Vector, train: Batch, val: Batch, damping: float = 0.0
) -> Vector:
    """Eq. 4 (Foo, Do and Ng 2008): ∂_λ C2 − (∂²_λθ C̃1)ᵀ (H + δI)⁻¹ ∇_θ C2.

    Exact where ∇_θ C̃1 = 0, H is invertible and δ = 0.
    """
    H = hessian(inner, theta, lam, train)
    v = nabla_theta(outer, theta, lam, val)
    x: Vector = np.linalg.solve(H + damping * np.eye(len(theta)), v)
    return nabla_lam(outer, theta, lam, val) - mixed(inner, theta, lam, train).T @ x


# Why a series: H⁻¹ costs n³, a product Hx costs two gradients. H⁻¹ = η Σ_k (I − ηH)^k if 0 < ηH < 2, and
# each term looks one step of training further back: K terms at a fixed point are the last K steps of SGD,
# unrolled. With K = 1, H⁻¹ ≈ ηI, which gives the greedy hypergradient again.


def neumann(
    inner: Cost, outer: Cost, theta: Vector, lam: Vector, train: Batch, val: Batch, eta: float, terms: int
) -> Vector:
    """∂_λ C2 − (∂²_λθ C̃1)ᵀ [η Σ_{k<K} (I − ηH)^k] ∇_θ C2 (Lorraine, Vicol and Duvenaud 2020, Algorithm
    3).
    """
    H = hessian(inner, theta, lam, train)
    term = nabla_theta(outer, theta, lam, val)
    x: Vector = np.zeros(len(theta))
    for _ in range(terms):
        x = x + eta * term
        term = term - eta * H @ term  # (I − ηH)^k v
    return nabla_lam(outer, theta, lam, val) - mixed(inner, theta, lam, train).T @ x


# Why conjugate gradients: for H symmetric and positive definite, the k-th iterate is the best x of all
# that k products Hv, H²v, … can express, where the series above takes whatever η gives.


def conjugate_gradients(H: Matrix, v: Vector, steps: int) -> list[Vector]:
    """Solve Hx = v from x_0 = 0: all of x_1, …, x_steps, each of shape (n,) (Hestenes and Stiefel 1952)."""
    x: Vector = np.zeros(len(v))
    r = p = v
    iterates = []
    for _ in range(steps):
        if r @ r > 0.0:  # otherwise x is already exact: keep it
            alpha = (r @ r) / (p @ H @ p)
            x = x + alpha * p
            r_next = r - alpha * H @ p
            p = r_next + (r_next @ r_next) / (r @ r) * p
            r = r_next
        iterates.append(x)
    return iterates


# ── The whole history: eq. 5 and 6 ──────────────────────────────────────────────────────────────────
# Why: nothing needs to be assumed if every update is differentiated. And updates are not only SGD, so
# let z = (θ, optimiser state) and let Φ be any update at all. Where A_t = ∂Φ/∂z and B_t = ∂Φ/∂λ,
#
#     z_{t+1} = Φ(z_t, λ, batch_t)   gives   dz_{t+1}/dλ = A_t dz_t/dλ + B_t.
#
# Unrolled from dz_0/dλ = 0 that is one sum,
#
#     dC2/dλ = ∂_λ C2 + Σ_k B_kᵀ (A_{k+1}ᵀ ⋯ A_{T−1}ᵀ) v,     v = ∇_z C2 = (∇_θ C2, 0).
#
# Greedy keeps its last term. Implicit has all terms, to T = ∞, at a fixed point of SGD, where every A is
# I − ηH and every B is −ηM: a geometric series, with the sum −Mᵀ H⁻¹ v.


def trajectory(Phi: UpdateMap, z: Vector, lam: Vector, batches: Sequence[Batch]) -> list[Vector]:
    """Eq. 5: the states z_0, …, z_T that training passes through."""
    states = [z]
    for t, batch in enumerate(batches):
        states.append(Phi(states[t], lam, batch, t))
    return states


def jacobians(Phi: UpdateMap, z: Vector, lam: Vector, batch: Batch, t: int) -> tuple[Matrix, Matrix]:
    """A_t = ∂Φ/∂z, shape (d, d), and B_t = ∂Φ/∂λ, shape (d, m), where d = len(z)."""
    return derivative(jacobian, Phi, 0, z, lam, batch, t), derivative(jacobian, Phi, 1, z, lam, batch, t)


def unrolled(
    Phi: UpdateMap,
    outer: Cost,
    z: Vector,
    lam: Vector,
    batches: Sequence[Batch],
    val: Batch,
    n_params: int,
    truncate: int | None = None,
) -> Vector:
    """Eq. 6: the sum above, from its last term to its first; θ is the first `n_params` entries of z.

    Backwards, v ← A_tᵀ v is a vector throughout, but every state has to be remembered. `truncate=K` keeps
    the last K terms (Shaban, Cheng, Hatch and Boots 2019); K = 1 is the greedy hypergradient of any Φ.
    """
    T = len(batches)
    states = trajectory(Phi, z, lam, batches)
    theta = states[T][:n_params]
    v: Vector = np.concatenate([nabla_theta(outer, theta, lam, val), np.zeros(len(z) - n_params)])
    total = nabla_lam(outer, theta, lam, val)
    for t in reversed(range(0 if truncate is None else max(0, T - truncate), T)):
        A, B = jacobians(Phi, states[t], lam, batches[t], t)
        total = total + B.T @ v
        v = A.T @ v
    return total


# Why forwards: the same sum can be accumulated during training, with no state remembered and a
# hypergradient available at every step. The price is a matrix Z = dz/dλ with a column for each λ.


def forward(
    Phi: UpdateMap, outer: Cost, z: Vector, lam: Vector, batches: Sequence[Batch], val: Batch, n_params: int
) -> Vector:
    """Z_{t+1} = A_t Z_t + B_t from Z_0 = 0; then ∂_λ C2 + Z_Tᵀ v (Franceschi et al. 2017, Forward-HG)."""
    Z: Matrix = np.zeros((len(z), len(lam)))
    for t, batch in enumerate(batches):
        A, B = jacobians(Phi, z, lam, batch, t)
        Z = A @ Z + B
        z = Phi(z, lam, batch, t)
    theta = z[:n_params]
    return nabla_lam(outer, theta, lam, val) + Z[:n_params].T @ nabla_theta(outer, theta, lam, val)


# ── The simplest case, as printed: eq. 7 ────────────────────────────────────────────────────────────
# Why: eq. 7 adds up the effect of λ on each update. It leaves out the effect of each update on later ones,
# A_t = I − ηH_t, and so it is eq. 6 only where the cost has no curvature: A_t = I.


def unrolled_sgd_ignoring_curvature(
    inner: Cost, outer: Cost, theta: Vector, lam: Vector, batches: Sequence[Batch], val: Batch, eta: float
) -> Vector:
    """Eq. 7: ∂_λ C2 − ∇_θ C2(θ_T) Σ_{k<T} η ∇_λ∇_θ C̃1,k."""
    M: Matrix = np.zeros((len(theta), len(lam)))
    for batch in batches:
        M = M + eta * mixed(inner, theta, lam, batch)
        theta = sgd_step(inner, theta, lam, batch, eta)
    return nabla_lam(outer, theta, lam, val) - M.T @ nabla_theta(outer, theta, lam, val)


# ── Training run backwards: Maclaurin, Duvenaud and Adams 2015 ──────────────────────────────────────
# Why: eq. 6 backwards must remember every state. But SGD with momentum is like motion with friction, and can
# be reversed: (θ_t, v_t) follows from (θ_{t+1}, v_{t+1}), so only the last state has to be kept. That holds
# in exact arithmetic: to undo friction is to divide by γ < 1, which magnifies rounding by 1/γ a step. (The
# paper stores the bits that are lost.) At γ = 0 the old velocity is lost, and the step cannot be reversed.


class MaclaurinGradients(NamedTuple):
    """Derivatives of C2(θ_T): w.r.t. lam (m,), etas (T,), gammas (T,), and θ_0, v_0 (n,)."""

    lam: Vector
    etas: Vector
    gammas: Vector
    theta: Vector
    velocity: Vector


def maclaurin(
    inner: Cost,
    outer: Cost,
    theta: Vector,
    velocity: Vector,
    lam: Vector,
    batches: Sequence[Batch],
    val: Batch,
    etas: Vector,
    gammas: Vector,
) -> MaclaurinGradients:
    """Algorithms 1 and 2, "Reverse-mode differentiation of SGD", with schedules η_t (their α_t) and γ_t > 0.

    v_{t+1} = γ_t v_t − (1 − γ_t) ∇_θ C̃1(θ_t),   θ_{t+1} = θ_t + η_t v_{t+1}.

    Their Algorithm 1 prints v_t in the last equation; Algorithm 2 and their code take v_{t+1}, as here.
    """
    T = len(batches)
    for t in range(T):  # Algorithm 1
        velocity = gammas[t] * velocity - (1 - gammas[t]) * nabla_theta(inner, theta, lam, batches[t])
        theta = theta + etas[t] * velocity

    d_theta = nabla_theta(outer, theta, lam, val)  # Algorithm 2
    d_lam = nabla_lam(outer, theta, lam, val)
    d_velocity, d_etas, d_gammas = np.zeros(len(theta)), np.zeros(T), np.zeros(T)
    for t in reversed(range(T)):
        eta, gamma, batch = etas[t], gammas[t], batches[t]
        d_etas[t] = d_theta @ velocity
        theta = theta - eta * velocity  # exactly reverse the operations of gradient descent
        g = nabla_theta(inner, theta, lam, batch)
        velocity = (velocity + (1 - gamma) * g) / gamma
        d_velocity = d_velocity + eta * d_theta
        d_gammas[t] = d_velocity @ (velocity + g)
        d_theta = d_theta - (1 - gamma) * d_velocity @ hessian(inner, theta, lam, batch)
        d_lam = d_lam - (1 - gamma) * d_velocity @ mixed(inner, theta, lam, batch)
        d_velocity = gamma * d_velocity
    return MaclaurinGradients(d_lam, d_etas, d_gammas, d_theta, d_velocity)


# ── The update maps of practice ─────────────────────────────────────────────────────────────────────
# Why: λ may be anything in Φ, such as the learning rate. So each constant of an optimiser is a number or
# a function of λ, and `unrolled` differentiates it like the rest. The rules are those of torch.optim.


def value(hyper: Hyper, lam: Vector) -> float:
    """Evaluate a constant of an update rule at λ."""
    return hyper(lam) if callable(hyper) else hyper


def stack(*parts: Vector) -> Vector:
    """Write z = (θ, optimiser state) as one vector."""
    z: Vector = np.concatenate(parts)
    return z


def root(s: Vector) -> Vector:
    """√s with derivative 0, in place of ∞, where s = 0.

    For Adam this is exact, if 0 < β₂ < 1 and its state starts at zero. Then s = (1 − β₂) Σ_k β₂^(t−k) g_k²
    is zero only where every gradient so far was zero, so that m = 0 as well, and in

        d[m / (√s + ε)] = dm / (√s + ε) − m d√s / (√s + ε)²

    the last term vanishes with m, whatever the slope d√s, as long as it is bounded. It is: if λ changes by δ,
    each g_k changes by O(δ), and √s ≤ max_k |g_k|. What remains is dm/ε, which the slope 0 yields as well as
    any other. RMSprop is the same with the present gradient g in place of m.
    """
    positive = s > 0.0
    r: Vector = np.where(positive, np.sqrt(np.where(positive, s, 1.0)), 0.0)
    return r


def sgd_map(
    inner: Cost, n: int, lr: Hyper, momentum: Hyper = 0.0, nesterov: bool = False, weight_decay: Hyper = 0.0
) -> UpdateMap:
    """SGD: g ← ∇_θ C̃1 + wd θ;  buf ← μ buf + g;  θ ← θ − lr buf, or θ − lr (g + μ buf) with Nesterov.

    z = [θ, buf], or [θ] alone where the momentum is the number 0.
    """

    def Phi(z: Vector, lam: Vector, batch: Batch, t: int) -> Vector:
        theta, eta = z[:n], value(lr, lam)
        g = nabla_theta(inner, theta, lam, batch) + value(weight_decay, lam) * theta
        if not callable(momentum) and momentum == 0.0:
            return theta - eta * g
        mu = value(momentum, lam)
        buf = mu * z[n:] + g
        return stack(theta - eta * (g + mu * buf if nesterov else buf), buf)

    return Phi


def adam_map(
    inner: Cost,
    n: int,
    lr: Hyper,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled: bool = False,
) -> UpdateMap:
    """Adam: m ← β₁ m + (1 − β₁) g;  s ← β₂ s + (1 − β₂) g²;  θ ← θ − lr m̂ / (√ŝ + ε).

    Kingma and Ba 2015, with m̂ = m / (1 − β₁^(t+1)) and ŝ = s / (1 − β₂^(t+1)), t counted from 0. Weight
    decay enters the gradient, g + wd θ, or is `decoupled`: θ ← (1 − lr wd) θ comes first, which is AdamW
    (Loshchilov and Hutter 2019).
    z = [θ, m, s], with m = s = 0 at the start.
    """

    def Phi(z: Vector, lam: Vector, batch: Batch, t: int) -> Vector:
        theta, m, s = z[:n], z[n : 2 * n], z[2 * n :]
        eta, b1, b2, wd = value(lr, lam), value(beta1, lam), value(beta2, lam), value(weight_decay, lam)
        g = nabla_theta(inner, theta, lam, batch)
        if decoupled:
            theta = theta * (1 - eta * wd)
        else:
            g = g + wd * theta
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * g**2
        m_hat, s_hat = m / (1 - b1 ** (t + 1)), s / (1 - b2 ** (t + 1))
        return stack(theta - eta * m_hat / (root(s_hat) + value(eps, lam)), m, s)

    return Phi


def rmsprop_map(
    inner: Cost,
    n: int,
    lr: Hyper,
    alpha: Hyper = 0.99,
    eps: Hyper = 1e-8,
    momentum: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
) -> UpdateMap:
    """RMSprop: s ← α s + (1 − α) g²;  u = g / (√s + ε);  buf ← μ buf + u;  θ ← θ − lr buf.

    Tieleman and Hinton 2012. z = [θ, s, buf], or [θ, s] where the momentum is the number 0 and buf is u.
    At the start s = buf = 0.
    """

    def Phi(z: Vector, lam: Vector, batch: Batch, t: int) -> Vector:
        theta, s, eta, a = z[:n], z[n : 2 * n], value(lr, lam), value(alpha, lam)
        g = nabla_theta(inner, theta, lam, batch) + value(weight_decay, lam) * theta
        s = a * s + (1 - a) * g**2
        u = g / (root(s) + value(eps, lam))
        if not callable(momentum) and momentum == 0.0:
            return stack(theta - eta * u, s)
        buf = value(momentum, lam) * z[2 * n :] + u
        return stack(theta - eta * buf, s, buf)

    return Phi


# ── The check ───────────────────────────────────────────────────────────────────────────────────────
# Why: a check that needs no derivative. Train twice, with λ a little larger and a little smaller.


def finite_difference(F: Callable[[Vector], float], lam: Vector, h: float) -> Vector:
    """[F(λ + h e_j) − F(λ − h e_j)] / 2h for each j, shape (m,): central differences, error O(h²)."""
    dF: Vector = np.array([(F(lam + h * e) - F(lam - h * e)) / (2 * h) for e in np.eye(len(lam))])
    return dF


def main() -> None:
    """Ridge regression with one penalty for each feature, where dC2/dλ is known in closed form.

    C̃1 = |Xθ − y|² / 2N + ½ Σ_j exp(λ_j) θ_j²  has its minimum at θ* = H⁻¹ Xᵀy/N with H = XᵀX/N + diag(e^λ),
    and so dC2/dλ_j = −e^{λ_j} θ*_j (H⁻¹ ∇C2)_j.
    """
    rng = np.random.RandomState(0)
    n, eta, T = 4, 0.3, 100
    truth, lam = rng.randn(n), np.array([-3.0, -1.0, 0.0, -2.0])
    X1, X2 = rng.randn(12, n), rng.randn(40, n)
    train, val = (X1, X1 @ truth + rng.randn(12)), (X2, X2 @ truth + rng.randn(40))

    def squared_error(theta: Vector, lam: Vector, batch: Batch) -> float:
        X, y = batch
        loss: float = np.mean((X @ theta - y) ** 2) / 2
        return loss

    def ridge(theta: Vector, lam: Vector) -> float:
        penalty: float = np.sum(np.exp(lam) * theta**2) / 2
        return penalty

    inner, outer = regularised_cost(squared_error, ridge), squared_error
    H = X1.T @ X1 / 12 + np.diag(np.exp(lam))
    theta = np.linalg.solve(H, X1.T @ train[1] / 12)
    exact = -np.exp(lam) * theta * np.linalg.solve(H, X2.T @ (X2 @ theta - val[1]) / 40)

    Phi, start, batches = sgd_map(inner, n, eta), np.zeros(n), [train] * T

    def C2_after_training(lam: Vector) -> float:
        return outer(trajectory(Phi, start, lam, batches)[T], lam, val)

    rows = {
        "closed form": exact,
        "implicit": implicit(inner, outer, theta, lam, train, val),
        f"neumann, {T} terms": neumann(inner, outer, theta, lam, train, val, eta, T),
        "neumann, 5 terms": neumann(inner, outer, theta, lam, train, val, eta, 5),
        f"unrolled, {T} steps": unrolled(Phi, outer, start, lam, batches, val, n),
        "unrolled, last 5": unrolled(Phi, outer, start, lam, batches, val, n, truncate=5),
        f"forward, {T} steps": forward(Phi, outer, start, lam, batches, val, n),
        "greedy, at the optimum": greedy(inner, outer, theta, lam, train, val, eta),
        f"eq. 7, {T} steps": unrolled_sgd_ignoring_curvature(inner, outer, start, lam, batches, val, eta),
        "central differences": finite_difference(C2_after_training, lam, 1e-4),
    }
    names = "".join(f"{f'λ_{j}':>11}" for j in range(n))
    print(f"{'dC2/dλ':24}{names}{'rel. error':>13}{'cosine':>9}")
    for name, g in rows.items():
        error = np.linalg.norm(g - exact) / np.linalg.norm(exact)
        cosine = g @ exact / (np.linalg.norm(g) * np.linalg.norm(exact))
        entries = "".join(f"{g_j:11.6f}" for g_j in g)
        print(f"{name:24}{entries}{error:13.1e}{cosine:9.4f}")


if __name__ == "__main__":
    main()
