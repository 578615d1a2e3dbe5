"""The laws that every backend obeys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.backend import Backend, find_backend
from hypergrad.testing.calculus import jvp, value_and_grad
from hypergrad.testing.problems import close, smooth, tree, vector


def is_a_backend(backend: Backend) -> None:
    """It has every method of the protocol, and is found from its own arrays."""
    assert isinstance(backend, Backend)
    assert find_backend(tree(backend, 0)) is find_backend({"x": vector(backend, 0, 2)})
    assert find_backend(vector(backend, 0)).name == backend.name


def arrays_come_back(backend: Backend) -> None:
    """NumPy values survive the way in and out, with shape and dtype, and are described rightly."""
    for dtype, kind in (("float64", "float"), ("float32", "float"), ("int64", "int"), ("bool", "bool")):
        values = np.array([[1, 0, 1]], dtype)
        array = backend.asarray(values)
        about = backend.describe(array)
        assert backend.owns(array) and backend.readable(array)
        assert (about.kind, about.shape, about.nbytes) == (kind, (1, 3), values.nbytes)
        np.testing.assert_array_equal(backend.to_numpy(array), values)
    like = backend.asarray(np.zeros(2, "float32"))
    assert backend.describe(backend.asarray(np.ones(3), like=like)).dtype == backend.describe(like).dtype


def trees_come_back(backend: Backend) -> None:
    """Flattening loses nothing, a ``None`` is no leaf, and paths are written as in Python."""
    x = {"layers": [{"w": vector(backend, 0, 2)}], "none": None}
    leaves, unflatten = backend.flatten(x)
    assert len(leaves) == 1 and unflatten(leaves)["none"] is None
    assert backend.paths(x, "params") == ["params['layers'][0]['w']"]
    assert backend.paths(leaves[0], "params") == ["params"]
    deeper = backend.map(lambda name, part: (name, part), {"a": 1}, {"a": [2, 3]})
    assert deeper == {"a": (1, [2, 3])}


def trees_are_vectors(backend: Backend) -> None:
    """Inner product, axpy, zeros and ravel agree with those of the flat vectors."""
    x, y = tree(backend, 0), tree(backend, 9)
    flat_x, flat_y = (backend.to_numpy(backend.ravel(t)[0]) for t in (x, y))
    np.testing.assert_allclose(backend.to_numpy(backend.inner(x, y)), flat_x @ flat_y, rtol=1e-12)
    moved = backend.to_numpy(backend.ravel(backend.axpy(0.5, x, y))[0])
    np.testing.assert_allclose(moved, 0.5 * flat_x + flat_y, rtol=1e-12)
    assert not backend.to_numpy(backend.ravel(backend.zeros(x))[0]).any()
    vector_x, unravel = backend.ravel(x)
    close(backend, unravel(vector_x), x, 0.0)


def scalars_are_numbers(backend: Backend) -> None:
    """``number`` reads a scalar in its own precision, unless a derivative goes through it."""
    for dtype in ("float32", "float64"):
        x = tree(backend, 0, dtype)
        scalar = backend.inner(x, x)
        value = backend.number(scalar)
        assert isinstance(value, np.floating) and str(value.dtype) == dtype
        assert value == backend.to_numpy(scalar) and backend.number(float(value)) == float(value)
    seen = []

    def f(x: Any) -> Any:
        seen.append(backend.number(backend.inner(x, x)))
        return backend.inner(x, x)

    value_and_grad(backend, f, tree(backend, 0))
    assert seen and all(value is None for value in seen)


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


def linearisations_push_forward(backend: Backend) -> None:
    """``push`` is a derivative in a direction, as often as needed, and for ``each`` of several."""
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


def pullbacks_come_apart(backend: Backend) -> None:
    """The part for one primal is that of the whole."""
    x, y, u = vector(backend, 0, 3), tree(backend, 9), vector(backend, 18, 3)

    def f(x: Any, y: Any) -> Any:
        return backend.xp.tanh(x * (y["w"] @ y["rest"][0]) + y["rest"][1][0])

    _, pullback = backend.pullback(f, x, y)
    for k, part in enumerate(pullback(u)):
        close(backend, pullback.onto(k)(u), part, 0.0)


def derivatives_nest(backend: Backend) -> None:
    """A Hessian is symmetric, and a third derivative agrees with differences of the second."""
    x, u, w = tree(backend, 0), tree(backend, 9), tree(backend, 18)

    def gradient(x: Any) -> Any:
        return value_and_grad(backend, lambda y: smooth(backend, y), x)[1]

    def curvature(x: Any) -> Any:
        return backend.inner(u, backend.pullback(gradient, x)[1](u)[0])

    _, pullback = backend.pullback(gradient, x)
    close(backend, backend.inner(w, pullback(u)[0]), backend.inner(u, pullback(w)[0]))
    _, third = value_and_grad(backend, curvature, x)
    h = 1e-5
    ends = [backend.to_numpy(curvature(backend.axpy(s * h, w, x))) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    np.testing.assert_allclose(backend.to_numpy(backend.inner(third, w)), slope, rtol=1e-6, atol=1e-8)


def outer_derivatives_reach_inside(backend: Backend) -> None:
    """A function that closes over a variable is differentiated by it: the mixed term."""
    x, lam = vector(backend, 0, 3), vector(backend, 1, 3)
    xp = backend.xp

    def gradient(lam: Any) -> Any:
        return value_and_grad(backend, lambda x: xp.sum(xp.exp(lam) * x**2), x)[1]

    _, pullback = backend.pullback(gradient, lam)
    close(backend, pullback(xp.ones_like(x))[0], 2.0 * xp.exp(lam) * x)


def linear_solves_have_the_derivatives_of_the_inverse(backend: Backend) -> None:
    """With x = A(s)⁻¹v, dx = A⁻¹(dv − dA x), to second order, however x was found."""
    base, slope = np.random.default_rng(0).normal(size=(2, 3, 3)) * 0.15
    k, m = backend.asarray(np.eye(3) + base), backend.asarray(slope)
    u, v, s = vector(backend, 0, 3), vector(backend, 5, 3), backend.asarray(0.7)

    def solve(matvec: Any, v: Any) -> Any:
        def step(x: Any, _: Any, __: Any) -> tuple[Any, None]:
            return backend.axpy(1.0, backend.axpy(-1.0, matvec(x), v), x), None

        return backend.scan(step, backend.zeros(v), 80)[0], 3

    def along(s: Any, v: Any) -> Any:
        x, seen = backend.linear_solve(lambda p: (k + s * m) @ p, v, solve, solve, False)
        assert not backend.readable(seen) or int(seen) == 3
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
    """``reached`` goes by the graph, not by a value, and what is not reached gets zeros."""
    x = {"used": vector(backend, 0, 2), "times_zero": vector(backend, 1, 2), "unused": vector(backend, 2, 2)}
    _, pullback = backend.pullback(lambda x: backend.xp.sum(x["used"] * x["used"] + 0.0 * x["times_zero"]), x)
    (gradient,) = pullback(backend.asarray(np.array(1.0)))
    assert pullback.reached == ({"used": True, "times_zero": True, "unused": False},)
    assert not backend.to_numpy(gradient["unused"]).any()
    assert pullback.nbytes > 0


def detached_values_are_constant(backend: Backend) -> None:
    """``detach`` and an aux result cut the graph."""
    x, sum_of = vector(backend, 0, 2), backend.xp.sum
    _, pullback = backend.pullback(lambda x: sum_of(backend.detach(x) * backend.detach(x)), x)
    assert pullback.reached == (False,)
    _, _, aux = backend.vjp(lambda x: (sum_of(x), x * 3.0), x)
    assert backend.readable(aux)
    close(backend, aux, x * 3.0)


def integers_are_carried_along(backend: Backend) -> None:
    """A leaf that is not floating point passes through and gets a zero cotangent."""
    x = {"n": backend.asarray(np.array([2, 3])), "x": vector(backend, 0, 2)}
    value, pullback = backend.pullback(lambda t: {"n": t["n"], "x": t["x"] * t["x"]}, x)
    (gradient,) = pullback(backend.map(lambda leaf: leaf, value))
    assert not backend.to_numpy(gradient["n"]).any()
    close(backend, gradient["x"], 2.0 * x["x"] * value["x"])


def dtypes_are_kept(backend: Backend) -> None:
    """float32 in, float32 out: values, gradients, second derivatives, vectors."""
    x = tree(backend, 0, "float32")
    value, gradient = value_and_grad(backend, lambda x: smooth(backend, x), x)
    _, pullback = backend.pullback(lambda x: value_and_grad(backend, lambda y: smooth(backend, y), x)[1], x)
    results = (value, gradient, pullback(x), backend.axpy(0.5, x, x), backend.zeros(x), backend.inner(x, x))
    assert {backend.describe(leaf).itemsize for leaf in backend.flatten(results)[0]} == {4}


def loops_are_loops(backend: Backend) -> None:
    """``scan`` forward, backward and over its own outputs; ``while_loop``; derivatives through a scan."""
    start = backend.asarray(np.array(1.0))
    items = backend.stack([backend.asarray(np.array(float(k))) for k in range(5)])

    def body(carry: Any, k: Any, _: Any) -> Any:
        return 2.0 * carry + backend.take(items, k), carry

    end, seen = backend.scan(body, start, 5)
    close(backend, end, backend.asarray(np.array(58.0)))
    back, _ = backend.scan(lambda c, k, x: (2.0 * c + x, None), start, 5, xs=seen, reverse=True)
    # Carries 1, 2, 5, 12, 27, read from the last to the first.
    close(backend, back, backend.asarray(np.array(32.0 + 27 * 16 + 12 * 8 + 5 * 4 + 2 * 2 + 1)))
    stopped = backend.while_loop(lambda c: c < 20.0, lambda c: 3.0 * c, start, 100)
    close(backend, stopped, backend.asarray(np.array(27.0)))
    _, slope = value_and_grad(
        backend, lambda s: backend.scan(lambda c, k, _: (c * c, None), s, 3)[0], 1.1 * start
    )
    close(backend, slope, backend.asarray(np.array(8 * 1.1**7)))
    empty, _ = backend.scan(body, start, 0)
    close(backend, empty, start)


def rounds_are_collected(backend: Backend) -> None:
    """``repeat`` keeps a row of each round until it stops; ``cond`` chooses, ``compile`` changes nothing."""

    def program(start: Any) -> Any:
        def body(carry: Any, k: Any) -> Any:
            return 2.0 * carry, {"before": carry, "k": k}, (carry, 7), carry < 10.0

        carry, rows, last, count = backend.repeat(body, start, 8)
        chosen = backend.cond(
            carry > 1.0, lambda: {"a": carry, "b": (carry,)}, lambda: {"a": start, "b": None}
        )
        return carry, backend.collect(rows), last, count, chosen

    start = backend.asarray(np.array(1.0))
    carry, rows, last, count, chosen = backend.compile(program)(start)
    rows = backend.collect([rows])
    seen = [float(x) for x in rows["before"][0][:5]]
    assert (float(backend.to_numpy(carry)), int(count), int(last[1])) == (32.0, 5, 7)
    assert seen == [1.0, 2.0, 4.0, 8.0, 16.0] and [int(k) for k in rows["k"][0][:5]] == [0, 1, 2, 3, 4]
    close(backend, (last[0], chosen["a"], chosen["b"][0]), (0.5 * carry, carry, carry))


def places_hold_what_was_put(backend: Backend) -> None:
    """``put`` fills the places of ``room`` in any order, and ``take`` finds it there, in a loop too."""

    def program(x: Any) -> Any:
        def body(items: Any, k: Any, _: Any) -> Any:
            return backend.set_row(items, 2 - k, {"x": k * x, "none": None}), None

        items, _ = backend.scan(body, backend.empty_rows({"x": x, "none": None}, 3), 3)
        items = backend.set_row(items, 1, {"x": 5.0 * x, "none": None})
        return [backend.take(items, k)["x"] for k in range(3)]

    x = backend.asarray(np.array([1.0, -2.0]))
    close(backend, backend.compile(program)(x), [2.0 * x, 5.0 * x, 0.0 * x])


def normal_numbers_are_the_same_again(backend: Backend) -> None:
    """``normal`` is a function of seed and count, and leaves the generator alone."""
    like, before = backend.asarray(np.ones(3)), repr(backend.random.state())
    drawn = [
        backend.to_numpy(backend.random.normal(s, k, (500, 4), like))
        for s, k in ((1, 2), (1, 2), (1, 3), (2, 2))
    ]
    assert np.array_equal(drawn[0], drawn[1]) and repr(backend.random.state()) == before
    for other in drawn[2:]:
        assert abs(np.corrcoef(drawn[0].ravel(), other.ravel())[0, 1]) < 0.1
    assert abs(drawn[0].mean()) < 0.1 and abs(drawn[0].std() - 1) < 0.1


def dtypes_can_be_changed(backend: Backend) -> None:
    """``cast`` goes by NumPy's names; what was moved to the host comes back."""
    x = backend.asarray(np.array([1.0, -2.0, 3.5]))
    whole = backend.cast(x, "int32")
    assert backend.describe(whole).dtype == "int32" and backend.to_numpy(whole).tolist() == [1, -2, 3]
    halves, rest, shifted = (backend.to_numpy(x).tolist() for x in (whole // 2, whole % 2, (whole << 3) >> 1))
    assert (halves, rest, shifted) == ([0, -1, 1], [1, 0, 1], [4, -8, 12])
    close(
        backend,
        backend.memory.from_host(backend.memory.to_host({"x": x, "none": None})),
        {"x": x, "none": None},
    )


def randomness_replays(backend: Backend) -> None:
    """A state of the generator can be replayed without disturbing what comes after."""
    before = backend.random.state()
    with backend.random.replay(backend.random.state(seed=1)):
        pass
    assert repr(backend.random.state()) == repr(before)
    backend.random.restore(before)
    assert repr(backend.random.state()) == repr(before)


BACKEND_LAWS: tuple[Callable[[Backend], None], ...] = (
    is_a_backend,
    arrays_come_back,
    trees_come_back,
    trees_are_vectors,
    scalars_are_numbers,
    gradients_are_derivatives,
    forward_is_reverse_transposed,
    linearisations_push_forward,
    pullbacks_are_linear,
    pullbacks_come_apart,
    derivatives_nest,
    outer_derivatives_reach_inside,
    linear_solves_have_the_derivatives_of_the_inverse,
    graphs_say_what_they_reach,
    detached_values_are_constant,
    integers_are_carried_along,
    dtypes_are_kept,
    loops_are_loops,
    rounds_are_collected,
    places_hold_what_was_put,
    normal_numbers_are_the_same_again,
    dtypes_can_be_changed,
    randomness_replays,
)
