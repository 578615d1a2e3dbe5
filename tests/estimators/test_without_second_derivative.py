"""The mixed term by finite differences, where a function has no second derivative."""

import pytest
import torch
from support.mixed import GREEDY, IMPLICIT, distance
from support.once_differentiable import FUNCTIONS, REMEDIES, torch_task

import hypergrad as hg
from hypergrad import errors

parametrize = pytest.mark.parametrize


@parametrize("function", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
class TestWithoutASecondDerivative:
    WAYS = {
        "greedy": GREEDY["momentum"][0],
        "gradient": GREEDY["gradient-of-sgd"][0],
        "identity": IMPLICIT["identity"],
        "cg": IMPLICIT["cg"],
    }

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @parametrize("way", WAYS)
    def test_exactly_is_refused(self, function, way):
        with pytest.raises(errors.UnsupportedOpError) as caught:
            torch_task(FUNCTIONS[function]()[0]).estimate(self.WAYS[way]())
        assert "FiniteDifference" in str(caught.value)
        assert REMEDIES[function.split("-")[0]] in str(caught.value)

    @parametrize("way", WAYS)
    def test_differences_agree_with_the_exact_way_of_the_same_function(self, function, way):
        without, smooth = FUNCTIONS[function]()
        make = self.WAYS[way]
        out = torch_task(without).estimate(make(products=hg.FiniteDifference()))
        exact = torch_task(smooth).estimate(make())
        for name in ("log_l2", "noise"):
            assert distance(out.hypergradient[name], exact.hypergradient[name]) <= 1e-6
