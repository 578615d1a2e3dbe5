"""Update rules for groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, final

from hypergrad.backend import Backend, Tree
from hypergrad.errors import ArgumentError
from hypergrad.updates.base import UpdateRule, Updates, as_update_rule


@final
@dataclass(frozen=True, eq=False)
class Partition(UpdateRule):
    r"""A rule for each group of parameters, as ``optax.partition`` and the groups of ``torch.optim``.

        θ_g ← Φ_g(θ_g)      g: the label of a leaf

    ``hg.Partition({"body": hg.SGD(0.01), "head": hg.Adam(lambda h: h["lr"])}, labels)`` trains the head by a
    rate of its own. A rule sees the leaves of its group alone: `ClipNorm` clips the norm of the group.

    Args:
        rules: the rule of each label.
        labels: a tree of labels like the parameters, or like the upper levels of their tree; or a function
            from the parameters to one.

    Raises:
        ArgumentError: when used, if the labels do not fit the parameters, or have no rule.
    """

    rules: Mapping[Hashable, Updates]
    labels: Tree | Callable[[Tree], Tree]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Mapping) or not self.rules:
            raise ArgumentError("Partition: rules is a dict from labels to update rules")
        for rule in self.rules.values():
            as_update_rule(rule)

    @property
    def connected(self) -> bool:  # type: ignore[override]
        """Whether all rules are."""
        return all(as_update_rule(rule).connected for rule in self.rules.values())

    @property
    def leafwise(self) -> bool:  # type: ignore[override]
        """Whether all rules are."""
        return all(as_update_rule(rule).leafwise for rule in self.rules.values())

    def init(self, backend: Backend, params: Tree) -> Tree:
        leaves = backend.flatten(params)[0]
        return tuple(
            rule.init(backend, [leaves[i] for i in members])
            for rule, members in self._groups(backend, params)
        )

    def update(
        self, backend: Backend, gradient: Tree, opt_state: Tree, params: Tree, hparams: Tree, step: Any
    ) -> tuple[Tree, Tree]:
        leaves, unflatten = backend.flatten(params)
        slopes, states = backend.flatten(gradient)[0], []
        for (rule, members), kept in zip(self._groups(backend, params), opt_state, strict=True):
            g, theta = ([tree[i] for i in members] for tree in (slopes, leaves))
            moved, kept = rule.update(backend, g, kept, theta, hparams, step)
            states.append(kept)
            leaves = list(leaves)
            for i, leaf in zip(members, moved, strict=True):
                leaves[i] = leaf
        return unflatten(leaves), tuple(states)

    def _groups(self, backend: Backend, params: Tree) -> list[tuple[UpdateRule, list[int]]]:
        """The rule of each group, and which leaves it has; groups without leaves are left out."""
        labels = self.labels(params) if callable(self.labels) else self.labels
        try:
            spread = backend.map(lambda label, part: backend.map(lambda _: label, part), labels, params)
        except (ValueError, TypeError, KeyError) as error:
            raise ArgumentError(
                "Partition: the labels do not fit the parameters: give a label for each of "
                + ", ".join(backend.paths(params, "params"))
            ) from error
        each = backend.flatten(spread)[0]
        if unknown := [label for label in each if label not in self.rules]:
            raise ArgumentError(
                f"Partition: no rule for the label {unknown[0]!r}; there are rules for "
                + ", ".join(map(repr, self.rules))
            )
        groups = [
            (as_update_rule(rule), [i for i, label in enumerate(each) if label == name])
            for name, rule in self.rules.items()
        ]
        return [(rule, members) for rule, members in groups if members]
