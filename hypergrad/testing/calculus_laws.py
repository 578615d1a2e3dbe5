"""Laws of derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.backend import Backend
from hypergrad.errors import UnsupportedOpError
from hypergrad.testing.calculus import jvp, value_and_grad
from hypergrad.testing.problems import close, smooth, tree, vector


def gradients_are_derivatives(backend: Backend) -> None:
    """``value_and_grad`` agrees with central differences."""
    x, d = tree(backend, 0), tree(backend, 9)
    _, gradient = value_and_grad(backend, lambda x: smooth(backend, x), x)
    h = 1e-6
    ends = [backend.to_numpy(smooth(backend, backend.axpy(s * h, d, x))) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    np.testing.assert_allclose(backend.to_numpy(backend.inner(gradient, d)), slope, rtol=1e-7)


def forward_is_reverse_transposed(backend: Backend) -> None:
    """⟨u, jvp(v)⟩ = ⟨vjp(u), v⟩."""
    x, v, u = tree(backend, 0), tree(backend, 9), vector(backend, 20, 3)

    def f(x: Any) -> Any:
        return backend.xp.tanh(x["w"] @ x["rest"][0] + x["rest"][1][0])

    value, tangent = jvp(backend, f, (x,), (v,))
    same, pullback = backend.pullback(f, x)
    close(backend, value, same)
    close(backend, backend.inner(u, tangent), backend.inner(pullback(u)[0], v))


def linearized_functions_push_forward(backend: Backend) -> None:
    """``push`` gives the derivative in a direction, can be called many times, and works under ``each``."""
    x, u, w = tree(backend, 0), tree(backend, 9), tree(backend, 18)

    def f(x: Any) -> tuple[Any, Any]:
        return {"y": backend.xp.tanh(x["w"] @ x["rest"][0])}, x["w"]

    value, push, aux = backend.linearize(f, x)
    close(backend, (value, aux), f(x))
    for direction in (u, w):
        close(backend, push(direction), jvp(backend, lambda x: f(x)[0], (x,), (direction,))[1])
    close(backend, backend.take(backend.each(push, backend.stack([u, w])), 1), push(w))
    reached = dict(zip(backend.paths(x, "x"), backend.flatten(push.reached[0])[0], strict=True))
    assert [path for path, flag in reached.items() if flag] == ["x['rest'][0]", "x['w']"]


def pullbacks_are_linear(backend: Backend) -> None:
    """A pullback can be called many times at one linearisation, and is linear."""
    x, u, w = tree(backend, 0), tree(backend, 9), tree(backend, 18)
    _, pullback = backend.pullback(lambda x: value_and_grad(backend, lambda y: smooth(backend, y), x)[1], x)
    (first,), (second,) = pullback(u), pullback(w)
    (both,) = pullback(backend.axpy(2.0, u, w))
    close(backend, both, backend.axpy(2.0, first, second))
    close(backend, pullback(u)[0], first, 0.0)


def pullbacks_have_parts(backend: Backend) -> None:
    """``onto(k)`` gives the k-th part of the result of a call, and ``last`` gives the same as a call."""
    x, y, u = vector(backend, 0, 3), tree(backend, 9), vector(backend, 18, 3)

    def f(x: Any, y: Any) -> Any:
        return backend.xp.tanh(x * (y["w"] @ y["rest"][0]) + y["rest"][1][0])

    _, pullback = backend.pullback(f, x, y)
    parts = pullback(u)
    for k, part in enumerate(parts):
        close(backend, pullback.onto(k)(u), part, 0.0)
    close(backend, pullback.last(u), parts, 0.0)


def derivatives_nest(backend: Backend) -> None:
    """Second and third derivatives agree with differences of the first and second; a Hessian is symmetric."""
    x, u, w = tree(backend, 0), tree(backend, 9), tree(backend, 18)

    def gradient(x: Any) -> Any:
        return value_and_grad(backend, lambda y: smooth(backend, y), x)[1]

    def slope(x: Any) -> Any:
        return backend.inner(u, gradient(x))

    def curvature(x: Any) -> Any:
        return backend.inner(u, backend.pullback(gradient, x)[1](u)[0])

    _, pullback = backend.pullback(gradient, x)
    close(backend, backend.inner(w, pullback(u)[0]), backend.inner(u, pullback(w)[0]))
    _, third = value_and_grad(backend, curvature, x)
    h = 1e-5
    ends = [backend.axpy(s * h, w, x) for s in (1, -1)]
    for derivative, below in (
        (backend.inner(w, pullback(u)[0]), slope),
        (backend.inner(third, w), curvature),
    ):
        high, low = (backend.to_numpy(below(end)) for end in ends)
        expected = (high - low) / (2 * h)
        np.testing.assert_allclose(backend.to_numpy(derivative), expected, rtol=1e-6, atol=1e-8)


def outer_derivatives_reach_inside(backend: Backend) -> None:
    """A function that closes over a variable has a derivative with respect to it: the mixed term."""
    x, lam = vector(backend, 0, 3), vector(backend, 1, 3)
    xp = backend.xp

    def gradient(lam: Any) -> Any:
        return value_and_grad(backend, lambda x: xp.sum(xp.exp(lam) * x**2), x)[1]

    _, pullback = backend.pullback(gradient, lam)
    close(backend, pullback(xp.ones_like(x))[0], 2.0 * xp.exp(lam) * x)


def linear_solves_have_the_derivatives_of_the_inverse(backend: Backend) -> None:
    """If x = A(s)⁻¹v, then dx = A⁻¹(dv − dA x), to second order, whatever the solver."""
    base, slope = np.random.default_rng(0).normal(size=(2, 3, 3)) * 0.15
    k, m = backend.asarray(np.eye(3) + base), backend.asarray(slope)
    u, v, s = vector(backend, 0, 3), vector(backend, 5, 3), backend.asarray(0.7)

    def solve(matvec: Any, v: Any) -> Any:
        def step(x: Any, _: Any, __: Any) -> tuple[Any, None]:
            return backend.axpy(1.0, backend.axpy(-1.0, matvec(x), v), x), None

        return backend.scan(step, backend.zeros(v), 80)[0], 3

    def along(s: Any, v: Any) -> Any:
        x, aux = backend.linear_solve(lambda p: (k + s * m) @ p, v, solve, solve, False)
        assert not backend.readable(aux) or int(aux) == 3
        return backend.inner(u, x)

    a, (u_, v_) = np.eye(3) + base + 0.7 * slope, (backend.to_numpy(x) for x in (u, v))
    x, w = np.linalg.solve(a, v_), np.linalg.solve(a.T, u_)
    value, pullback = backend.pullback(along, s, v)
    np.testing.assert_allclose(backend.to_numpy(value), u_ @ x, rtol=1e-10)
    by_s, by_v = (backend.to_numpy(g) for g in pullback(backend.xp.ones_like(value)))
    np.testing.assert_allclose(by_s, -w @ slope @ x, rtol=1e-8)
    np.testing.assert_allclose(by_v, w, rtol=1e-8)
    _, second = value_and_grad(backend, lambda s: value_and_grad(backend, lambda s: along(s, v), s)[1], s)
    np.testing.assert_allclose(
        backend.to_numpy(second), 2 * w @ slope @ np.linalg.solve(a, slope @ x), rtol=1e-8
    )

    # Of two leaves only the second depends on s.
    def apart(s: Any) -> Any:
        def matvec(p: Any) -> Any:
            return {"free": 0.5 * p["free"], "held": (k + s * m) @ p["held"]}

        x, _ = backend.linear_solve(matvec, {"free": u, "held": v}, solve, solve, False)
        return backend.inner({"free": v, "held": u}, x)

    value, slope_of = value_and_grad(backend, apart, s)
    np.testing.assert_allclose(backend.to_numpy(value), 2 * u_ @ v_ + u_ @ x, rtol=1e-10)
    np.testing.assert_allclose(backend.to_numpy(slope_of), -w @ slope @ x, rtol=1e-8)


def graphs_say_what_they_reach(backend: Backend) -> None:
    """``reached`` depends on the graph, not on values, and leaves that are not reached get zeros."""
    x = {"used": vector(backend, 0, 2), "times_zero": vector(backend, 1, 2), "unused": vector(backend, 2, 2)}
    _, pullback = backend.pullback(lambda x: backend.xp.sum(x["used"] * x["used"] + 0.0 * x["times_zero"]), x)
    (gradient,) = pullback(backend.asarray(np.array(1.0)))
    assert pullback.reached == ({"used": True, "times_zero": True, "unused": False},)
    assert not backend.to_numpy(gradient["unused"]).any()
    assert pullback.nbytes > 0


def values_say_what_they_use(backend: Backend) -> None:
    """``uses`` finds what a value is computed from: all that a derivative reaches, and nothing detached."""
    names = ("used", "times_zero", "detached", "unused")
    x = {name: vector(backend, k, 2) for k, name in enumerate(names)}

    def f(x: Any, other: Any) -> tuple[Any, None]:
        parts = x["used"] * x["used"] + 0.0 * x["times_zero"] + backend.detach(x["detached"])
        return backend.xp.sum(parts), None

    expected = {"used": True, "times_zero": True, "detached": False, "unused": False}
    assert backend.uses(f, x, 2.0 * x["used"]) == (expected, False)


def detached_values_are_constant(backend: Backend) -> None:
    """No derivative passes through what ``detach`` returned, and none through an aux result."""
    x, sum_of = vector(backend, 0, 2), backend.xp.sum
    _, pullback = backend.pullback(lambda x: sum_of(backend.detach(x) * backend.detach(x)), x)
    assert pullback.reached == (False,)
    _, _, aux = backend.vjp(lambda x: (sum_of(x), x * 3.0), x)
    assert backend.readable(aux)
    close(backend, aux, x * 3.0)


def integers_pass_through(backend: Backend) -> None:
    """A leaf that is not floating point passes through unchanged and gets a zero cotangent."""
    x = {"n": backend.asarray(np.array([2, 3])), "x": vector(backend, 0, 2)}
    value, pullback = backend.pullback(lambda t: {"n": t["n"], "x": t["x"] * t["x"]}, x)
    (gradient,) = pullback(backend.map(lambda leaf: leaf, value))
    assert not backend.to_numpy(gradient["n"]).any()
    close(backend, gradient["x"], 2.0 * x["x"] * value["x"])


def dtypes_are_kept(backend: Backend) -> None:
    """Values, gradients, second derivatives and vectors of float32 arrays are float32."""
    x = tree(backend, 0, "float32")
    value, gradient = value_and_grad(backend, lambda x: smooth(backend, x), x)
    _, pullback = backend.pullback(lambda x: value_and_grad(backend, lambda y: smooth(backend, y), x)[1], x)
    results = (value, gradient, pullback(x), backend.axpy(0.5, x, x), backend.zeros(x), backend.inner(x, x))
    assert {backend.describe(leaf).itemsize for leaf in backend.flatten(results)[0]} == {4}


def missing_derivatives_raise(backend: Backend) -> None:
    """``nondifferentiable`` returns its argument, and a derivative through it raises `UnsupportedOpError`."""
    x = tree(backend, 0)
    close(backend, backend.nondifferentiable(x, "a test"), x, 0.0)
    try:
        backend.pullback(lambda x: backend.inner(backend.nondifferentiable(x, "a test"), x), x)[1](
            backend.asarray(1.0)
        )
    except UnsupportedOpError as error:
        assert "a test" in str(error)
    else:
        raise AssertionError("a derivative was taken through nondifferentiable()")


CALCULUS_LAWS = (
    gradients_are_derivatives,
    forward_is_reverse_transposed,
    linearized_functions_push_forward,
    pullbacks_are_linear,
    pullbacks_have_parts,
    derivatives_nest,
    outer_derivatives_reach_inside,
    linear_solves_have_the_derivatives_of_the_inverse,
    graphs_say_what_they_reach,
    values_say_what_they_use,
    detached_values_are_constant,
    integers_pass_through,
    dtypes_are_kept,
    missing_derivatives_raise,
)
