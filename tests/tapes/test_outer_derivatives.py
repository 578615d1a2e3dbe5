"""Derivatives of hypergradients, through tapes."""

import numpy as np
import pytest
from support.frameworks import each_backend, with_a_generator
from support.tapes import net

import hypergrad as hg
from hypergrad.errors import UnsupportedOpError
from hypergrad.testing.calculus import value_and_grad

parametrize = pytest.mark.parametrize


class TestOuterDerivatives:
    """∂/∂η of a sum of hypergradients: right where states stay what they are, refused where they do not."""

    @staticmethod
    def slope(backend, tape):
        p = net(backend, 4, with_start=False)

        def total(rate):
            rule = hg.SGD(lambda h: h["rate"], momentum=0.5)
            unrolled = hg.Unrolled(rule, 4, tape=tape, allow_unused=True)
            hparams = p.hparams | {"rate": rate}
            state = unrolled.init(p.problem, p.params, hparams)
            out = unrolled.estimate(p.problem, state, hparams, p.train, p.val)
            return backend.xp.sum(out.hypergradient["log_l2"])

        return value_and_grad(backend, total, backend.asarray(np.array(0.05)))[1]

    @parametrize("tape", [hg.States(), hg.Offload(hg.States())], ids=repr)
    @each_backend
    def test_of_what_keeps_states(self, backend, tape):
        exact = backend.to_numpy(self.slope(backend, hg.Full()))
        np.testing.assert_allclose(backend.to_numpy(self.slope(backend, tape)), exact, rtol=1e-11)

    @each_backend
    def test_of_integers(self, backend):
        with pytest.raises(UnsupportedOpError, match="Reversible"):
            self.slope(backend, hg.Reversible())

    @with_a_generator
    def test_of_files(self, backend, tmp_path):
        with pytest.raises(UnsupportedOpError, match="Offload"):
            self.slope(backend, hg.Offload(hg.States(), tmp_path))
