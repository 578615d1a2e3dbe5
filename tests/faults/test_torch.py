"""Modes of torch, and what has no second derivative there."""

import numpy as np
import optree
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from support.faults import (
    RIDGE,
    SGD,
    batches,
    converted,
    each_tree,
    estimate,
    every_estimator,
    fit,
    refused,
    ridge,
    says,
    strengths,
    weights,
)
from support.frameworks import on_torch
from support.installed import torch

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


@on_torch
class TestModesOfTorch:
    @every_estimator
    @each_tree
    def test_inference_tensors_are_refused(self, backend, estimator, tree, leaf):
        with torch.inference_mode():
            inside = {tree: {leaf: torch.full((2,), 0.5, dtype=torch.float64)}}
        call = (errors.DisconnectedError, ValueError, estimate, backend, estimator)
        says(refused(*call, **inside), "inference_mode", "clone()")
        with torch.inference_mode():
            says(refused(*call), "inference_mode", "no_grad")

    @every_estimator
    def test_under_no_grad_nothing_changes(self, backend, estimator):
        expected = estimate(backend, estimator)
        with torch.no_grad():
            found = estimate(backend, estimator)
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        assert_array_equal(found.state.params["w"], expected.state.params["w"])

    @every_estimator
    def test_leaves_that_require_gradients_get_none(self, backend, estimator):
        given = converted(backend, {"params": weights(), "hparams": strengths()})
        for leaf in optree.tree_leaves(given):
            leaf.requires_grad_()
        found, expected = estimate(backend, estimator, **given), estimate(backend, estimator)
        assert_array_equal(found.hypergradient["x"], expected.hypergradient["x"])
        assert all(leaf.grad is None for leaf in optree.tree_leaves(given))
        spoilt = [batches()[0] | {"y": np.full(5, np.nan)}] * 3
        call = (estimate, backend, estimator)
        refused(errors.NonFiniteError, ArithmeticError, *call, train=spoilt, **given)

    @parametrize("response", ["update", "gradient"])
    @parametrize("every", [1, 2])
    def test_a_run_from_leaves_that_require_gradients_keeps_no_graph(self, backend, response, every):
        params, hparams, train = converted(backend, (weights(), strengths(), batches()))
        for leaf in (params["w"], hparams["x"]):
            leaf.requires_grad_()
        done = hg.Tuner(RIDGE, hg.Greedy(SGD, response), every=every).run(params, hparams, train, train, 4)
        assert not (done.params["w"].requires_grad or done.hparams["x"].requires_grad)


def through(f):
    """T1 with f between the parameters and the fit, and noise of learned strength before it."""
    noisy = lambda p, h, b: f(p["w"] + h["x"] * b["x"][0])  # noqa: E731
    return hg.Bilevel(lambda p, h, b: fit({"w": noisy(p, h, b)}, h, b) + (p["w"] ** 2).sum(), fit)


def attend(x, kernel=None):
    """Attention of a short sequence to itself: in a kernel of torch's, or by its definition."""
    q = torch.stack([x, x**2, x**3])
    if kernel is None:
        return (torch.softmax(q @ q.T / 2**0.5, -1) @ q)[0]
    with torch.nn.attention.sdpa_kernel(kernel):
        return torch.nn.functional.scaled_dot_product_attention(*[q[None, None]] * 3)[0, 0, 0]


@on_torch
class TestWithoutSecondDerivative:
    @staticmethod
    def is_refused(backend, estimator, f, *parts):
        call = (estimate, backend, estimator, through(f))
        says(refused(errors.UnsupportedOpError, NotImplementedError, *call), *parts)

    @every_estimator
    def test_fused_attention(self, backend, estimator):
        kernels = torch.nn.attention.SDPBackend
        fused = lambda x: attend(x, kernels.FLASH_ATTENTION)  # noqa: E731
        self.is_refused(backend, estimator, fused, "attention", "SDPBackend.MATH")
        found = estimate(backend, estimator, through(lambda x: attend(x, kernels.MATH)))
        expected = estimate(backend, estimator, through(attend))
        assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-10)

    @every_estimator
    def test_fused_attention_in_t2_which_needs_none(self, backend, estimator):
        kernels = torch.nn.attention.SDPBackend
        found, expected = (
            estimate(backend, estimator, hg.Bilevel(ridge, lambda p, h, b, k=k: attend(p["w"], k).sum()))
            for k in (kernels.FLASH_ATTENTION, None)
        )
        assert_allclose(found.hypergradient["x"], expected.hypergradient["x"], rtol=1e-10)

    @every_estimator
    def test_a_function_that_is_once_differentiable(self, backend, estimator):
        class Cube(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**3

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                return 3.0 * g * x**2

        self.is_refused(backend, estimator, Cube.apply, "Cube", "once_differentiable")

    @every_estimator
    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch's compiler hides otherwise
    def test_a_compiled_module(self, backend, estimator):
        compiled = torch.compile(torch.nn.Tanh(), backend="aot_eager")
        self.is_refused(backend, estimator, compiled, "torch.compile", "_orig_mod")
