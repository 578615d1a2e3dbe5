"""What type checkers refuse: each line that is marked is an error, and without it this file has none."""

import hypergrad as hg

problem = hg.Bilevel(lambda p, h, b: p @ p, lambda p, h, b: p @ p)
hg.Tuner(problem, hg.Greedy(hg.SGD(0.1)), space="positive")  # type: ignore[arg-type]
hg.Tuner(problem, hg.Greedy(hg.SGD(0.1)), hyper_update=3)  # type: ignore[arg-type]
hg.Greedy("sgd")  # type: ignore[arg-type]
hg.Implicit(hg.CG(), "exact")  # type: ignore[arg-type]
hg.Damped("cg", 1e-3)  # type: ignore[arg-type]
