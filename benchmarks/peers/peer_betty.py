"""betty: problems in a graph; each level has a type, by which its best response is differentiated.

Its engine is set up once, as for a whole run; what is timed is `Problem.backward` of the upper level, which
is what the engine calls for a hypergradient, and the loss before it.
"""

import logging

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn

from benchmarks.peers.frameworks import Entry, Task

STEPS = 1000
"""Its solvers have no tolerance: so many iterations are run, whatever comes of them."""


class Vector(nn.Module):
    """A tensor as a module."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values.clone())


def entries(task: Task) -> list[Entry]:
    if not task.workload.implicit:
        # "darts" differentiates one step, at its end and without its learning rate: another estimator.
        return []
    kappa = task.workload.about.get("kappa", 10.0)
    steps, terms = (60, 300) if kappa < 100 else (STEPS, STEPS)
    return [
        entry(task, "cg, default", type="cg"),
        entry(task, f"cg, {steps} iterations", type="cg", cg_iterations=steps),
        entry(task, f"neumann, {terms} terms", type="neumann", neumann_iterations=terms, neumann_alpha=0.8),
    ]


def entry(task: Task, setting: str, **config) -> Entry:
    class Lower(ImplicitProblem):
        def training_step(self, batch):
            return task.inner(self.module.values, self.upper.module.values, batch)

    class Upper(ImplicitProblem):
        def training_step(self, batch):
            return task.outer(self.lower.module.values, self.module.values, batch)

    made = []

    def set_up(params, hparams, train, val):
        logging.disable(logging.INFO)
        module = Vector(params)
        lower = Lower(
            name="lower", config=Config(**config), module=module,
            optimizer=torch.optim.SGD(module.parameters(), 0.0), train_data_loader=[train],
        )  # fmt: skip
        module = Vector(hparams)
        upper = Upper(
            name="upper", config=Config(), module=module,
            optimizer=torch.optim.SGD(module.parameters(), 0.0), train_data_loader=[val],
        )  # fmt: skip
        graph = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        Engine(config=EngineConfig(strategy="cpu"), problems=[upper, lower], dependencies=graph)
        lower.cur_batch = train
        made.append(upper)
        logging.disable(logging.NOTSET)

    def estimate(params, hparams, train, val):
        if not made:
            set_up(params, hparams, train, val)
        (upper,) = made
        upper.module.zero_grad()
        upper.backward(
            upper.training_step(val), upper.trainable_parameters(), upper._paths, retain_graph=True
        )
        return upper.module.values.grad.clone()

    return Entry("betty", setting, estimate)
