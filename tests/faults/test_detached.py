"""Losses that the graph is cut in."""

import pytest
from autograd.tracer import getval
from support.faults import each_loss, estimate, every_estimator, fit, losses, refused, ridge, says
from support.frameworks import BACKENDS
from support.installed import jax, torch

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


def detach(x):
    return x.detach()


def no_grad(x):
    with torch.no_grad():
        return 1.0 * x


def stop_gradient(x):
    return jax.lax.stop_gradient(x)


CUTS = [("numpy", getval), ("torch", detach), ("torch", no_grad), ("jax", stop_gradient)]
CUTS = {f"{name}-{cut.__name__}": (BACKENDS[name], cut) for name, cut in CUTS if name in BACKENDS}


@parametrize("backend, cut", CUTS.values(), ids=CUTS)
class TestDetached:
    @every_estimator
    @each_loss
    def test_parameters(self, backend, cut, estimator, where, data):
        problem = losses(where, lambda p, h, b: ridge({"w": cut(p["w"])}, h, b))
        error = refused(errors.DisconnectedError, ValueError, estimate, backend, estimator, problem)
        assert error.path.startswith("params")
        says(error, where, error.path, "autograd")

    @every_estimator
    def test_a_hyperparameter(self, backend, cut, estimator):
        problem = hg.Bilevel(lambda p, h, b: ridge(p, {"x": cut(h["x"])}, b), fit)
        error = refused(errors.DisconnectedError, ValueError, estimate, backend, estimator, problem)
        assert error.path == "hparams['x']"
        says(error, "hparams['x']", "autograd")
