"""A module tuner gives each kind of warning once, at the user's line."""

import warnings

import pytest

import hypergrad as hg

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("call", ["step", "tune", "run"])
def test_once(call):
    from hypergrad_torch import ModuleTuner

    model = torch.nn.Linear(3, 1).double()
    hparams = {"added": torch.tensor(0.5).double()}
    tuner = ModuleTuner(
        model,
        torch.optim.SGD(model.parameters(), 0.01),
        hparams,
        inner=lambda model, h, b: model(b).pow(2).mean() + h["added"],
        outer=lambda model, h, b: model(b).mean(),
        every=1,
    )
    batch = torch.ones(4, 3).double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if call == "run":
            tuner.run(lambda t: batch, lambda t: batch, 5)
        else:
            for _ in range(5):
                getattr(tuner, call)(batch, batch)
    assert [warning.category for warning in said] == [hg.errors.ZeroResponseWarning]
    assert said[0].filename == __file__
