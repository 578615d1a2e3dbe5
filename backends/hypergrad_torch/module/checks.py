"""What `ModuleTuner` refuses, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter, signature

from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad.backend import Tree
from hypergrad.errors import ArgumentError, UnsupportedOpError, explain
from hypergrad.estimators import Greedy, HypergradientEstimator, Implicit, Unrolled
from hypergrad_torch.backend import TorchBackend
from hypergrad_torch.dialects import dialect
from hypergrad_torch.optimizers import TorchOptimizer

_WRAPPERS = {
    "OptimizedModule": (
        "a module compiled by torch.compile",
        "hand in the module itself, `compiled._orig_mod`, and the optimiser over its parameters",
    ),
    "DistributedDataParallel": (
        "a DistributedDataParallel module, whose gradients are averaged outside of the graph",
        "hand in `ddp.module`; average training gradients and hypergradients over the ranks yourself",
    ),
    "FullyShardedDataParallel": (
        "an FSDP module, which has no double backward",
        "hand in the module before it is sharded",
    ),
    "FSDPModule": (
        "an FSDP module, which has no double backward",
        "hand in the module before it is sharded",
    ),
}


def check_module(model: nn.Module) -> None:
    """Refuse wrappers around a module through which derivatives are wrong or missing.

    Raises:
        UnsupportedOpError: naming the wrapper and the way out.
        ArgumentError: if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    for part in model.modules():
        for base in type(part).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                what, remedy = _WRAPPERS[base.__name__]
                raise UnsupportedOpError(
                    explain(
                        f"the model is or holds {what}",
                        "Its second derivatives would be wrong or missing.",
                        (remedy,),
                    )
                )


def check_estimator(estimator: HypergradientEstimator, optimizer: Optimizer) -> None:
    """Refuse an estimator that does not train by the module's optimiser, or that cannot be used in place.

    Raises:
        ArgumentError: naming the estimator.
        UnsupportedOpError: for an optimiser that it would have to differentiate through and cannot.
    """
    if isinstance(estimator, Implicit):
        _check_closure(optimizer)
        return
    if not isinstance(estimator, Greedy | Unrolled):
        raise ArgumentError(
            f"ModuleTuner: estimator = {estimator!r}; it must be a Greedy, an Unrolled or an Implicit"
        )
    rule = estimator.update
    given = rule.optimizer if isinstance(rule, TorchOptimizer) else rule
    if given is not optimizer:
        raise ArgumentError(
            f"ModuleTuner: the module is trained by its optimizer, so {type(estimator).__name__} takes "
            f"that one, not {given!r}"
        )
    if isinstance(estimator, Unrolled) and estimator.start is not None:
        raise ArgumentError("ModuleTuner: the module begins where it stands; leave start= out of Unrolled")
    if isinstance(estimator, Unrolled) or estimator.response == "update":
        dialect(optimizer)
    _check_closure(optimizer)


def _check_closure(optimizer: Optimizer) -> None:
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise UnsupportedOpError(
            explain(
                f"{type(optimizer).__name__}.step needs a closure",
                "It evaluates the loss several times, and is no function of one gradient.",
                (
                    "train with another optimiser",
                    "train by your own loop, and call hg.hypergradient with hg.Implicit where it ends",
                ),
            )
        )


def check_tuned(backend: TorchBackend, lam: Tree, hyper_update: object) -> None:
    """Refuse an optimiser of other tensors as ``hyper_update``.

    Raises:
        ArgumentError: if it holds none of λ.
    """
    if isinstance(hyper_update, Optimizer):
        held = {id(h) for group in hyper_update.param_groups for h in group["params"]}
        if not any(id(h) in held for h in backend.flatten(lam)[0]):
            raise ArgumentError(
                "ModuleTuner: the optimiser given as hyper_update holds none of hparams, so none would ever "
                "be updated"
            )


def check_distinct(backend: TorchBackend, lam: Tree, params: Iterable[Tensor]) -> None:
    """Refuse one tensor in two roles.

    Raises:
        ArgumentError: naming both.
    """
    roles: dict[int, str] = {id(p): "a parameter that the optimizer trains" for p in params}
    for path, h in zip(backend.paths(lam, "hparams"), backend.flatten(lam)[0], strict=True):
        if id(h) in roles:
            raise ArgumentError(f"ModuleTuner: {path} is also {roles[id(h)]}: give each tensor one place")
        roles[id(h)] = path


def trained(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the module's parameters that the optimiser updates, by name.

    Raises:
        ArgumentError: for tensors that are not the module's, and for hooks that would never be called.
    """
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"ModuleTuner: optimizer = {optimizer!r}; it must be a torch.optim optimiser")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = dict(model.named_parameters())
    if foreign := held - {id(p) for p in own.values()}:
        raise ArgumentError(
            f"ModuleTuner: the optimizer holds {len(foreign)} tensors that are no parameters of the model: "
            "give those their own optimiser, or make them part of the module"
        )
    for name, p in own.items():
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ArgumentError(
                f"ModuleTuner: params[{name!r}] has a hook after gradient accumulation, such as an optimiser "
                "in the backward pass: gradients are not accumulated here, and it would never be called"
            )
    return {name: p for name, p in own.items() if id(p) in held and p.requires_grad}
