"""The suites of `hypergrad.testing`: ours obey them, a third party needs three lines, faults are caught."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from support.frameworks import BACKENDS, NUMPY

import hypergrad as hg
from hypergrad import testing
from hypergrad.backend import vectors
from hypergrad.estimators import Estimate, HypergradientEstimator
from hypergrad.solvers import Solver
from hypergrad.solvers.system import Solution
from hypergrad.tapes import Tape
from hypergrad.testing import parametrize_with_laws
from hypergrad.updates import UpdateRule

NAMES = [name for name in BACKENDS if name != "jax"]
"""JAX compiles every law anew; what is said here is about the algorithms, which have one home."""
COMPILED = [name for name in BACKENDS if name == "jax"]
SOLVERS = [hg.CG(), hg.CG(preconditioner=hg.Diagonal()), hg.MINRES(), hg.GMRES(), hg.GMRES(restart=3)]
SOLVERS += [hg.BiCGStab(), hg.Direct(), hg.Neumann(2000, 0.3), hg.Neumann(5, 0.1, rtol=None), hg.Nystrom(3)]
SOLVERS += [hg.Identity(0.1), hg.Diagonal(), hg.Damped(hg.CG(), 0.1), hg.LevenbergMarquardt(hg.CG())]
SOLVERS += [hg.Warm(hg.CG())]
TAPES = [hg.Full(), hg.States(), hg.Binomial(2), hg.Binomial(3), hg.Reversible(), hg.Offload(hg.States())]
RULES = [hg.SGD(0.1), hg.SGD(0.1, 0.9, nesterov=True), hg.Adam(0.1), hg.AdamW(0.1), hg.Adagrad(0.1)]
RULES += [hg.RMSprop(0.1, momentum=0.5), hg.ClipNorm(hg.SGD(0.1), 1.0), hg.SGD(lambda h: h["tilt"])]
SPACES = [hg.Real(), hg.Positive(), hg.Positive("softplus"), hg.NonNegative(), hg.Simplex()]
SPACES += [hg.Interval(0.0, 1.0), hg.Interval(-0.3, 0.1)]


@parametrize_with_laws(*SOLVERS, *TAPES, *RULES, *SPACES, backends=NAMES)
def test_ours(law):
    law()


@pytest.mark.skipif("jax" not in BACKENDS, reason="needs JAX")
@parametrize_with_laws(
    hg.CG(), hg.States(), hg.Adam(0.1), hg.Simplex(), backends=["jax"] * ("jax" in BACKENDS)
)
def test_ours_where_everything_is_compiled(law):
    law()


@parametrize_with_laws(hg.MINRES(), hg.Binomial(2), hg.Adam(0.1), hg.Positive(), backends=["pebble"])
def test_ours_on_the_backend_of_a_third_party(law):
    law()


class TestSuites:
    def test_every_law_has_a_name_and_says_what_it_demands(self):
        for subject in (NUMPY, hg.Greedy(hg.SGD(0.1)), hg.CG(), hg.Full(), hg.SGD(0.1), hg.Real()):
            laws = testing.laws_of(subject)
            assert len({law.__name__ for law in laws}) == len(laws) > 3
            assert all(law.__doc__ for law in laws)

    def test_anything_else_is_refused(self):
        with pytest.raises(hg.errors.ArgumentError):
            testing.laws_of(object())

    def test_a_case_names_all_three(self):
        case = next(testing.cases(hg.CG(), backends=["numpy"]))
        assert str(case) == f"a_success_is_one-numpy-{hg.CG()!r}"


# Broken implementations, each with the laws that catch it.


@dataclass(frozen=True)
class BrokenSolver(Solver):
    """CG with one fault."""

    rtol: float | None = 1e-6
    atol: float = 0.0

    def residual(self, old: Any, new: Any) -> Any:
        return new

    def iterate(self, old: Any, new: Any) -> Any:
        return new

    def solve(self, system: Any, memory: Any = None) -> Solution:
        system = system.begun()
        backend, x, r = system.backend, system.x, system.r
        p, products, limit = r, system.spent, self.target(system)
        believed = r
        while float(vectors.norm(backend, believed)) > float(limit) and products < 50:
            ap = system.product(p)
            alpha = backend.inner(r, r) / backend.inner(p, ap)
            new_x, new_r = backend.axpy(alpha, p, x), backend.axpy(-alpha, ap, r)
            beta = backend.inner(new_r, new_r) / backend.inner(r, r)
            believed, x, r = self.residual(r, new_r), self.iterate(x, new_x), new_r
            p, products = backend.axpy(beta, p, r), products + 1
        return self.said(Solution(x, products, products), believed, limit, backend)

    def said(self, solution: Any, believed: Any, limit: Any, backend: Any) -> Any:
        return solution


class WithAnOldResidual(BrokenSolver):
    """Stops by a residual that is not that of its x, after the first step."""

    def residual(self, old: Any, new: Any) -> Any:
        return vectors.scale(NUMPY, 1e-9, old)


class ThatDropsItsLastIterate(BrokenSolver):
    def solve(self, system: Any, memory: Any = None) -> Solution:
        kept = []

        class Remembering(BrokenSolver):
            def iterate(self, old: Any, new: Any) -> Any:
                kept.append(old)
                return new

        solution = Remembering().solve(system, memory)
        return solution._replace(x=kept[-1]) if kept else solution


class ThatBelievesItself(BrokenSolver):
    """Takes three steps and reports success."""

    def solve(self, system: Any, memory: Any = None) -> Solution:
        kept: list[Any] = []

        class Short(BrokenSolver):
            def iterate(self, old: Any, new: Any) -> Any:
                kept.append(new)
                return new

        solution = Short().solve(system, memory)
        return solution._replace(x=kept[min(2, len(kept) - 1)]) if kept else solution


class ThatCountsWrongly(BrokenSolver):
    def said(self, solution: Any, *_: Any) -> Any:
        return solution._replace(products=solution.products + 1)


class ThatWidens(BrokenSolver):
    def said(self, solution: Any, believed: Any, limit: Any, backend: Any) -> Any:
        return solution._replace(x=backend.map(lambda x: x.astype(float), solution.x))


class ThatDrawsItsStart(BrokenSolver):
    rng: ClassVar[Any] = np.random.default_rng(0)

    def said(self, solution: Any, believed: Any, limit: Any, backend: Any) -> Any:
        return solution._replace(x=backend.map(lambda x: x + 1e-9 * self.rng.normal(), solution.x))


class ThatAddsAConstant(BrokenSolver):
    def said(self, solution: Any, believed: Any, limit: Any, backend: Any) -> Any:
        return solution._replace(x=backend.map(lambda x: x + 1e-3, solution.x))


class ThatIgnoresItsStart(BrokenSolver):
    """Adds the start once more."""

    def solve(self, system: Any, memory: Any = None) -> Solution:
        solution = super().solve(system, memory)
        return solution if system.x is None else solution._replace(x=vectors.add(NUMPY, solution.x, system.x))


class WrappedTape(Tape):
    """Binomial checkpointing with one fault in what it is given."""

    def changed(self, path: Any) -> Any:
        return path

    def record(self, path: Any, z: Any, hparams: Any) -> Any:
        return hg.States().record(self.changed(path), z, hparams)


class ThatIsOneStepOff(WrappedTape):
    """Pulls back through the batches of the next step."""

    def record(self, path: Any, z: Any, hparams: Any) -> Any:
        recording = hg.States().record(path, z, hparams)
        shifted = hg.States().record(replace(path, batch=lambda k: path.batch(k + 1), losses={}), z, hparams)
        return recording._replace(pull=shifted.pull)


class ThatForgetsAStep(WrappedTape):
    def record(self, path: Any, z: Any, hparams: Any) -> Any:
        recording = hg.States().record(path, z, hparams)
        if path.length == 1:
            return recording
        shorter = hg.States().record(replace(path, length=path.length - 1), z, hparams)
        return recording._replace(pull=shorter.pull)


class ThatTrainsLonger(WrappedTape):
    def record(self, path: Any, z: Any, hparams: Any) -> Any:
        longer = hg.States().record(replace(path, length=path.length + 1), z, hparams)
        return hg.States().record(path, z, hparams)._replace(z=longer.z)


class WithAnotherMask(WrappedTape):
    """Draws anew where it replays."""

    def record(self, path: Any, z: Any, hparams: Any) -> Any:
        recording = hg.States().record(path, z, hparams)
        again = hg.States().record(path, z, hparams)
        return recording._replace(pull=again.pull)


class ThatDrawsItself(WrappedTape):
    rng: ClassVar[Any] = np.random.default_rng(0)

    def record(self, path: Any, z: Any, hparams: Any) -> Any:
        recording, size = hg.States().record(path, z, hparams), 1.0 + 1e-12 * self.rng.normal()

        def pull(v: Any) -> Any:
            pulled = recording.pull(v)
            return pulled._replace(hparams=vectors.scale(NUMPY, size, pulled.hparams))

        return recording._replace(pull=pull)


class ThatKnowsDictsAlone(WrappedTape):
    def record(self, path: Any, z: Any, hparams: Any) -> Any:
        assert all(isinstance(leaf, np.ndarray) and leaf.ndim for leaf in z.params.values())
        return hg.States().record(path, z, hparams)


@dataclass(frozen=True)
class BrokenRule(UpdateRule):
    """A step of momentum with one fault."""

    connected: bool = False

    def init(self, backend: Any, params: Any) -> Any:
        return backend.zeros(params)

    def update(self, backend: Any, g: Any, state: Any, params: Any, hparams: Any, step: Any) -> Any:
        state = backend.axpy(0.9, state, self.changed(backend, g))
        return backend.axpy(-0.1, state, params), state

    def changed(self, backend: Any, g: Any) -> Any:
        return g


class ThatCutsTheGraph(BrokenRule):
    def changed(self, backend: Any, g: Any) -> Any:
        return backend.detach(g)


class ThatClaimsToBeConnected(ThatCutsTheGraph):
    def __init__(self) -> None:
        super().__init__(connected=True)


class ThatWidensIts(BrokenRule):
    def update(self, backend: Any, g: Any, state: Any, params: Any, hparams: Any, step: Any) -> Any:
        params, state = super().update(backend, g, state, params, hparams, step)
        return params, backend.map(lambda x: x * np.ones(()), state)


class ThatChangesItsArguments(BrokenRule):
    def update(self, backend: Any, g: Any, state: Any, params: Any, hparams: Any, step: Any) -> Any:
        for leaf in state.values():
            if isinstance(leaf, np.ndarray):
                leaf *= 0.5
        return super().update(backend, g, state, params, hparams, step)


class WithAWrongDerivative(BrokenRule):
    """Half of the gradient is detached."""

    def changed(self, backend: Any, g: Any) -> Any:
        return backend.map(lambda whole, cut: 0.5 * whole + 0.5 * cut, g, backend.detach(g))


class ThatCountsInIntegers(BrokenRule):
    def changed(self, backend: Any, g: Any) -> Any:
        return g

    def update(self, backend: Any, g: Any, state: Any, params: Any, hparams: Any, step: Any) -> Any:
        rate = 0.1 if isinstance(step, int) else 0.2
        return backend.axpy(-rate, g, params), backend.axpy(0.9, state, g)


class WithARandomStart(BrokenRule):
    rng: ClassVar[Any] = np.random.default_rng(0)

    def init(self, backend: Any, params: Any) -> Any:
        return backend.map(lambda x: x + self.rng.normal(), params)


class Broken(hg.Space):
    """All real numbers with one fault."""

    def constrain(self, xp: Any, u: Any) -> Any:
        return u

    def unconstrain(self, xp: Any, h: Any) -> Any:
        return h

    def project(self, xp: Any, u: Any) -> Any:
        return u

    def contains(self, xp: Any, h: Any) -> Any:
        return xp.isfinite(h)


class WithoutAnInverse(Broken):
    def unconstrain(self, xp: Any, h: Any) -> Any:
        return h + 1.0


class WithoutAProjection(Broken):
    def contains(self, xp: Any, h: Any) -> Any:
        return (h > -5.0) & (h < 5.0)


class ThatProjectsFurther(Broken):
    def project(self, xp: Any, u: Any) -> Any:
        return 0.5 * u


class ThatIsWide(Broken):
    def constrain(self, xp: Any, u: Any) -> Any:
        return u * np.ones((1, 1))


class ThatContainsAll(Broken):
    def contains(self, xp: Any, h: Any) -> Any:
        return h == h


class WithACutMap(Broken):
    def constrain(self, xp: Any, u: Any) -> Any:
        return u + NUMPY.detach(xp.exp(0.1 * u))

    def unconstrain(self, xp: Any, h: Any) -> Any:
        u = h - 1.0
        for _ in range(60):
            u = h - xp.exp(0.1 * u)
        return u


class BrokenEstimator(HypergradientEstimator):
    """`Greedy` or `Unrolled` with one fault in its result."""

    base: ClassVar[Any] = hg.Greedy(hg.SGD(0.1))

    training_steps: ClassVar[Any] = 1
    is_exact: ClassVar[Any] = False
    update: ClassVar[Any] = hg.SGD(0.1)

    def _init(self, backend: Any, params: Any) -> Any:
        return self.base._init(backend, params)

    def _estimate(self, backend: Any, problem: Any, state: Any, hparams: Any, train: Any, val: Any) -> Any:
        out = self.base._estimate(backend, problem, state, hparams, train, val)
        return self.changed(backend, out, state, hparams)

    def changed(self, backend: Any, out: Estimate[Any], state: Any, hparams: Any) -> Any:
        return out


class WithTheWrongSign(BrokenEstimator):
    def changed(self, backend: Any, out: Any, *_: Any) -> Any:
        return out._replace(hypergradient=vectors.scale(backend, -1.0, out.hypergradient))


class ThatSumsOverALeaf(BrokenEstimator):
    """A perturbation of a whole leaf in place of one for each entry."""

    def changed(self, backend: Any, out: Any, *_: Any) -> Any:
        summed = backend.map(lambda g: backend.xp.sum(g), out.hypergradient)
        return out._replace(hypergradient=summed)


class ThatUnrollsOneStepLess(BrokenEstimator):
    base = hg.Unrolled(hg.SGD(0.1), 4, truncate=3)
    training_steps = 4
    is_exact = True


class ThatForgetsTheDirectTerm(BrokenEstimator):
    def changed(self, backend: Any, out: Any, state: Any, hparams: Any) -> Any:
        direct = out.report.direct_norm
        return out._replace(
            hypergradient=backend.map(lambda g: g - direct / backend.xp.sqrt(2.0), out.hypergradient)
        )


class ThatClips(BrokenEstimator):
    def changed(self, backend: Any, out: Any, *_: Any) -> Any:
        norm = vectors.norm(backend, out.hypergradient)
        return out._replace(hypergradient=vectors.scale(backend, 1.0 / norm, out.hypergradient))


class ThatForgetsToCount(BrokenEstimator):
    def changed(self, backend: Any, out: Any, state: Any, hparams: Any) -> Any:
        return out._replace(state=out.state._replace(step=state.step))


class WithNoise(BrokenEstimator):
    rng: ClassVar[Any] = np.random.default_rng(0)

    def changed(self, backend: Any, out: Any, *_: Any) -> Any:
        scale = 1.0 + 1e-9 * self.rng.normal()
        return out._replace(hypergradient=vectors.scale(backend, scale, out.hypergradient))


def without(name):
    """NumPy's backend with a namespace that lacks a function."""
    backend = type("Lacking", (type(NUMPY),), {"name": "lacking"})()
    xp = {key: value for key, value in vars(NUMPY.xp).items() if key != name}
    type(backend).xp = SimpleNamespace(**xp)
    return backend


CAUGHT = {
    "a_success_is_one": [WithAnOldResidual, ThatDropsItsLastIterate, ThatBelievesItself, ThatAddsAConstant],
    "easy_systems_are_solved": [ThatDropsItsLastIterate, ThatBelievesItself, ThatAddsAConstant],
    "unsolvable_systems_are_failures": [BrokenSolver],
    "products_are_counted": [ThatCountsWrongly],
    "solutions_are_homogeneous": [ThatAddsAConstant],
    "a_right_side_of_zero_has_the_solution_zero": [ThatAddsAConstant],
    "solutions_have_the_form_of_the_right_side": [ThatWidens],
    "solves_are_pure": [ThatDrawsItsStart],
    "a_start_is_one": [ThatIgnoresItsStart],
    "hypergradients_are_derivatives_of_the_training": [ThatIsOneStepOff, ThatForgetsAStep],
    "training_is_unchanged": [ThatTrainsLonger],
    "truncated_unrolls_agree": [ThatIsOneStepOff, ThatForgetsAStep],
    "noise_is_replayed": [WithAnotherMask],
    "records_are_pure": [ThatDrawsItself],
    "tapes_hold_any_tree": [ThatKnowsDictsAlone],
    "updates_keep_the_form": [ThatWidensIts],
    "updates_are_pure": [ThatChangesItsArguments],
    "updates_depend_on_the_gradient": [ThatCutsTheGraph, ThatClaimsToBeConnected],
    "derivatives_of_updates_are_right": [ThatCutsTheGraph, WithAWrongDerivative],
    "steps_may_be_arrays": [ThatCountsInIntegers],
    "states_begin_the_same": [WithARandomStart],
    "free_coordinates_round_trip": [WithoutAnInverse],
    "projected_coordinates_are_inside": [WithoutAProjection],
    "projections_keep_what_is_allowed": [ThatProjectsFurther],
    "coordinates_keep_shape_and_dtype": [ThatIsWide],
    "what_is_no_number_is_outside": [ThatContainsAll],
    "derivatives_of_the_map_are_right": [WithACutMap],
    "results_have_the_form_of_hparams": [ThatSumsOverALeaf],
    "estimates_are_pure": [WithNoise],
    "hypergradients_are_linear_in_the_validation_loss": [ThatClips],
    "direct_terms_are_added": [ThatForgetsTheDirectTerm, ThatClips],
    "exact_hypergradients_are_derivatives_of_the_training": [ThatUnrollsOneStepLess],
    "hypergradients_point_uphill": [WithTheWrongSign],
    "steps_are_counted": [ThatForgetsToCount],
}
PAIRS = [(name, broken) for name, each in CAUGHT.items() for broken in each]


@pytest.mark.parametrize("name, broken", PAIRS, ids=[f"{name}-{b.__name__}" for name, b in PAIRS])
def test_a_broken_one_is_caught(name, broken):
    (case,) = (case for case in testing.cases(broken()) if case.law.__name__ == name)
    with np.errstate(all="ignore"), pytest.raises((AssertionError, hg.HypergradError)):
        case()


@pytest.mark.parametrize("name", ["tanh", "where", "linalg", "maximum", "isfinite"])
def test_a_namespace_that_lacks_a_function_is_caught(name):
    caught = []
    for case in testing.cases(without(name)):
        try:
            case()
        except (AssertionError, AttributeError):
            caught.append(case.law.__name__)
    assert caught


def test_every_law_but_those_of_backends_catches_something():
    subjects = (hg.Greedy(hg.SGD(0.1)), hg.CG(), hg.Full(), hg.SGD(0.1), hg.Real())
    assert {law.__name__ for subject in subjects for law in testing.laws_of(subject)} == CAUGHT.keys()


@parametrize_with_laws(BrokenRule(), Broken(), WrappedTape(), BrokenEstimator())
def test_without_their_fault_they_pass(law):
    """So that each is caught for its fault alone."""
    law()
