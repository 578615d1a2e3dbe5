"""What the networks and the runs need of JAX and of torch, and the library's backends do not have."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.backend import get_backend


class Jax:
    """All starts of a group are one program, mapped over starts, and share their draws of noise."""

    name = "jax"

    def __init__(self) -> None:
        import jax

        self.jax, self.xp, self.backend = jax, jax.numpy, get_backend("jax")

    def array(self, values: Any) -> Any:
        return self.xp.asarray(values)

    def key(self, seed: int) -> Any:
        return self.jax.random.key(seed)

    def draw(self, key: Any, step: Any) -> Any:
        return self.jax.random.fold_in(key, step)

    def normal(self, draw: Any, layer: int, shape: Any) -> Any:
        return self.jax.random.normal(self.jax.random.fold_in(draw, layer), shape)

    def var(self, x: Any, axes: Any) -> Any:
        return self.xp.var(x, axis=axes)

    def detach(self, x: Any) -> Any:
        return self.jax.lax.stop_gradient(x)

    def one_hot(self, labels: Any) -> Any:
        return self.jax.nn.one_hot(labels, 10)

    def convolved(self, x: Any, w: Any) -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        return self.jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

    def pooled(self, x: Any) -> Any:
        """The largest of 2 × 2."""
        n, h, w, c = x.shape
        return self.xp.max(x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c), axis=(2, 4))

    def stacked(self, starts: list[Any]) -> Any:
        return self.jax.tree.map(lambda *leaves: self.xp.stack(leaves), *starts)

    def mapped(self, f: Any, axes: tuple[int | None, ...]) -> Any:
        """A function with two results, over starts, as one compiled program."""
        return self.jax.jit(self.jax.vmap(f, axes))

    def each(self, states: Any, name: str) -> Any:
        """A part of the state of all starts."""
        return getattr(states, name)

    def paired(self, a: Any, b: Any) -> Any:
        """What all starts have, and more that all starts have."""
        return a, b

    def in_turn(self, f: Any) -> Any:
        """One of each start and of something shared, where all at once would take too much memory."""
        return self.jax.jit(lambda starts, shared: self.jax.lax.map(lambda start: f(start, shared), starts))

    def rows(self, tree: Any) -> list[Any]:
        """NumPy values, a tree for each start."""
        tree = self.jax.tree.map(np.asarray, tree)
        count = len(self.jax.tree.leaves(tree)[0])
        return [self.jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(count)]


class Torch:
    """Starts are trained one after another, in plain torch."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self.torch, self.backend = torch, get_backend("torch")
        self.xp = self.backend.xp

    def array(self, values: Any) -> Any:
        return self.torch.as_tensor(np.asarray(values))

    def key(self, seed: int) -> Any:
        return seed

    def draw(self, key: Any, step: Any) -> Any:
        return self.torch.tensor(int(key) * 1_000_003 + int(step))

    def normal(self, draw: Any, layer: int, shape: Any) -> Any:
        generator = self.torch.Generator().manual_seed(int(draw) * 101 + layer)
        return self.torch.randn(tuple(shape), generator=generator)

    def var(self, x: Any, axes: Any) -> Any:
        return self.torch.var(x, dim=axes, correction=0)

    def detach(self, x: Any) -> Any:
        return x.detach()

    def one_hot(self, labels: Any) -> Any:
        return self.torch.nn.functional.one_hot(labels.long(), 10).float()

    def convolved(self, x: Any, w: Any) -> Any:
        out = self.torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), padding="same")
        return out.permute(0, 2, 3, 1)

    def pooled(self, x: Any) -> Any:
        return self.torch.nn.functional.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    def stacked(self, starts: list[Any]) -> Any:
        return [self.backend.map(self.array, start) for start in starts]

    def mapped(self, f: Any, axes: tuple[int | None, ...]) -> Any:
        def all_starts(*arguments: Any) -> Any:
            count = next(len(a) for a, axis in zip(arguments, axes, strict=True) if axis == 0)
            results = [
                f(*(a[k] if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)))
                for k in range(count)
            ]
            return tuple(list(column) for column in zip(*results, strict=True))

        return all_starts

    def each(self, states: Any, name: str) -> Any:
        return [getattr(state, name) for state in states]

    def paired(self, a: Any, b: Any) -> Any:
        return list(zip(a, b, strict=True))

    def in_turn(self, f: Any) -> Any:
        def all_starts(starts: Any, shared: Any) -> Any:
            with self.torch.no_grad():
                return [f(start, shared) for start in starts]

        return all_starts

    def rows(self, tree: Any) -> list[Any]:
        def value(leaf: Any) -> Any:
            return leaf.detach().numpy() if isinstance(leaf, self.torch.Tensor) else np.asarray(leaf)

        return [self.backend.map(value, row) for row in tree]


def framework(name: str) -> Jax | Torch:
    return {"jax": Jax, "torch": Torch}[name]()
