"""Arrays whose axes stand in another order than ours: (y, x, ky, kx), or (frames, ky, kx)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ..counts import InputError


OURS = {4: ("y", "x", "ky", "kx"), 3: ("frames", "ky", "kx")}


class Turned:
    """An array on disk with its axes in our order, read when its first ones are sliced."""

    def __init__(self, array: Any, axes: tuple[int, ...]):
        self.array, self.axes = array, axes
        self.shape = tuple(array.shape[axis] for axis in axes)
        chunks = getattr(array, "chunks", None)
        self.chunks = chunks and tuple(chunks[axis] for axis in axes)
        self.ndim, self.dtype = len(axes), array.dtype

    def __getitem__(self, item: Any) -> Shaped[np.ndarray, "..."]:
        wanted = item if isinstance(item, tuple) else (item,)
        parts: list[Any] = [slice(None)] * self.ndim
        for axis, part in zip(self.axes, wanted, strict=False):
            parts[axis] = part
        read = self.array[tuple(parts)]
        # An index takes its axis away.
        kept = [axis for axis in self.axes if isinstance(parts[axis], slice)]
        return np.transpose(read, [sorted(kept).index(axis) for axis in kept])


def in_order(values: Sequence[Any], axes: tuple[int, ...] | None) -> list[Any]:
    """What is said of each axis of an array, in our order."""
    return list(values) if axes is None else [values[axis] for axis in axes]


def places(label: str, shape: tuple[int, ...], order: str) -> tuple[int, ...]:
    """For each of our axes, which axis of an array it is; `order` names the array's: "ky kx y x".

    **Raises:** InputError unless it names each of ours once.
    """
    named, ours = order.replace(",", " ").split(), OURS.get(len(shape), ())
    if not ours:
        raise InputError(
            f"{label} has the sizes {shape}; frames need four axes (y, x, ky, kx), in any order, or"
            " three (frames, ky, kx) with a `scan_shape`."
        )
    if sorted(named) != sorted(ours):
        raise InputError(
            f"{label} has the sizes {shape}, but order={order!r} was given; it names each of "
            f"{', '.join(ours)} once, in the order of these sizes."
        )
    return tuple(named.index(name) for name in ours)
