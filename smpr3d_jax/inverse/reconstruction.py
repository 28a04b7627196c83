"""The optimisation loop; it knows no physics and no files.

`make_step` is one compiled step, `reconstruct` the loop around it. The loss is a mean over the
frames of a batch; a large batch is differentiated chunk by chunk and averaged.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, islice, repeat
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..data.dataset import Batch, batch, Dataset
from .batches import draw, ordered
from .losses import figures_of_merit, Loss, summary
from .updates import Updates


TABLE_CHUNKS = 8
"""Chunks differentiated at once where a table moves; measured, five to ten are equally fast."""


class Result(NamedTuple):
    """The model found, the history of the run, and what is needed to go on."""

    model: PyTree
    history: dict[str, list[float]]
    state: Any


class Step(NamedTuple):
    """What a callback is told after each step; steps are numbered from 1."""

    number: int
    model: PyTree
    state: Any
    history: dict[str, list[float]]


def mean_over_chunks(function: Callable[[Batch], PyTree], frames: Batch, chunk: int) -> PyTree:
    """Average over frames of a function that is itself a mean over the frames it is given."""
    size = frames.index.shape[0]
    rows, rest = divmod(size, chunk)

    def cut(first, count):
        # Cut inside the loop: rows cut beforehand would be one more copy of the data.
        some = lambda a: jax.lax.dynamic_slice_in_dim(a, first, count)
        counts, index = jax.tree.map(some, (frames.counts, frames.index))
        return Batch(counts, index, frames.mask)

    def add(sums, row):
        return jax.tree.map(jnp.add, sums, function(cut(row * chunk, chunk))), None

    last = min(size, chunk) if rest == 0 else rest
    like = jax.eval_shape(lambda: function(cut(0, last)))
    sums = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    if rows:
        sums, _ = jax.lax.scan(add, sums, jnp.arange(rows, dtype=jnp.int32))
    if rest:
        left = function(cut(rows * chunk, rest))
        # The last, smaller chunk counts by its share of a whole one.
        sums = jax.tree.map(lambda a, b: a + b * (rest / chunk), sums, left)
    return jax.tree.map(lambda a: a * (chunk / size), sums)


def make_step(
    loss: Loss, updates: Updates, chunk: int = 64
) -> Callable[..., tuple[PyTree, Any, Float[Array, ""]]]:
    """One compiled step: `(model, state, batch) -> (model, state, value)`.

    A second batch may follow: held-out frames, to which only what is their own is fitted.

    Only the leaves that `updates` names are differentiated; `value` is the loss before the step.
    The loss, its gradient and a function of the free leaves are handed on to optax, as its line
    searches want them. Steps of the same `loss` and `updates` are compiled once.
    """
    return partial(_step, loss, updates, chunk)


@eqx.filter_jit
def _step(loss, updates, chunk, model, state, frames, aside=None):
    return advance(loss, updates, chunk, model, state, frames, aside)


def advance(
    loss: Loss, updates: Updates, chunk: int, model: PyTree, state: Any, frames: Batch,
    aside: Batch | None = None,
) -> tuple[PyTree, Any, Float[Array, ""]]:  # fmt: skip
    """What `make_step` compiles."""
    value, gradient, value_of = slopes(loss, updates, chunk, model, frames, aside)
    return *moved(updates, model, state, gradient, value, value_of, frames.index), value


def moved(
    updates: Updates, model: PyTree, state: Any, gradient: PyTree, value: Float[Array, ""],
    value_of: Callable[[PyTree], Float[Array, ""]], index: Int[Array, " frames"],
) -> tuple[PyTree, Any]:  # fmt: skip
    """The model after its optimisers have seen what `slopes` found, and their states."""
    moving = updates.free(model)
    free, fixed = eqx.partition(model, moving)
    # Optax multiplies complex leaves by real numbers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        move, state = updates.update(
            eqx.filter(gradient, moving), state, free, value, value_of, model=model, index=index
        )
    return refreshed(eqx.combine(eqx.apply_updates(free, move), fixed), moving), state


def slopes(
    loss: Loss, updates: Updates, chunk: int, model: PyTree, frames: Batch,
    aside: Batch | None = None,
) -> tuple[Float[Array, ""], PyTree, Callable[[PyTree], Float[Array, ""]]]:  # fmt: skip
    """The loss, the direction of its steepest ascent in the leaves that move, and the function."""
    moving = updates.free(model)
    free, fixed = eqx.partition(model, moving)
    inner, outer, pull = _shared(free, fixed, moving)
    # The gradient of a table is as large as the table: fewer, larger chunks then.
    chunk = chunk if pull is None else TABLE_CHUNKS * chunk

    data_loss, penalty = getattr(loss, "data", loss), getattr(loss, "penalty", None)

    def value_of(inner, part):
        return data_loss(eqx.combine(inner, outer), part)

    def value_anywhere(free):
        there = refreshed(eqx.combine(free, fixed), moving)
        part = jax.checkpoint(lambda part: data_loss(there, part))
        value = mean_over_chunks(part, frames, chunk)
        return value if penalty is None else value + penalty(there)

    slope = jax.value_and_grad(value_of)
    value, gradient = mean_over_chunks(lambda part: slope(inner, part), frames, chunk)
    if penalty is not None:
        more = jax.value_and_grad(lambda inner: penalty(eqx.combine(inner, outer)))(inner)
        value, gradient = jax.tree.map(jnp.add, (value, gradient), more)
    if aside is not None:
        own = _of_frames(data_loss, aside, inner, outer, updates, chunk)
        share = aside.index.shape[0] / frames.index.shape[0]
        gradient = jax.tree.map(lambda a, b: a if b is None else a + share * b, gradient, own)
    gradient = gradient if pull is None else pull(gradient)
    # JAX's gradient of a complex leaf is the conjugate of the direction of ascent.
    return value, jax.tree.map(jnp.conj, gradient), value_anywhere


def _of_frames(loss, aside, inner, outer, updates, chunk):
    """Gradient over held-out frames with respect to what is their own; None for other leaves."""
    mask = updates.free_of_frames(jax.tree.map(lambda leaf: True, inner))
    own, common = eqx.partition(inner, mask)
    slope = jax.grad(lambda own, part: loss(eqx.combine(own, common, outer), part))
    return mean_over_chunks(lambda part: slope(own, part), aside, chunk)


def refreshed(model: PyTree, moving: PyTree) -> PyTree:
    """The model with its stores made to agree with the leaves that are `moving`."""
    refresh = getattr(model, "refreshed", None)
    return model if refresh is None else refresh(moving)


def _shared(free, fixed, moving):
    """What chunks are differentiated with respect to, the rest, and the way back to `free`.

    Where the model keeps a table of what its frames share, that is part of it, so that the way from
    the free leaves to the table is gone once a step. None for the way where there is no table.
    """
    model = eqx.combine(free, fixed)
    fresh = refreshed(model, moving)
    follows = jax.tree.map(lambda old, new: new is not old, model, fresh)
    if not any(jax.tree.leaves(follows)):
        return free, fixed, None
    touched = jax.tree.map(lambda a, b: a or b, moving, follows)

    def inner(free):
        model = eqx.combine(free, fixed)
        known = lambda old, new, differs: _stand_in(old, new) if differs else old
        return eqx.filter(jax.tree.map(known, model, refreshed(model, moving), follows), touched)

    value, pull = jax.vjp(inner, free)
    return value, eqx.filter(model, touched, inverse=True), lambda gradient: pull(gradient)[0]


@jax.custom_vjp
def _stand_in(stored, fresh):
    """`stored`, known to equal `fresh`, with the derivatives of `fresh`, which need not be made."""
    return stored


_stand_in.defvjp(lambda stored, fresh: (stored, None), lambda _, to: (jnp.zeros_like(to), to))


def make_evaluation(
    chunk: int = 64,
) -> Callable[[PyTree, Batch], dict[str, Float[Array, ""]]]:
    """Compiled figures of merit of `(model, batch)`: deviance per pixel and R-factor."""
    return partial(_evaluate, chunk)


@eqx.filter_jit
def _evaluate(chunk, model, frames):
    part = lambda b: jax.tree.map(jnp.mean, figures_of_merit(model, b))
    means = mean_over_chunks(part, frames, chunk)
    pixels = frames.pixels
    pixels = pixels if isinstance(pixels, int) else pixels.astype(means["deviance"].dtype)
    return summary(means, pixels)


def start(model: PyTree, updates: Updates) -> Any:
    """The optimiser's state before the first step."""
    return updates.init(model)


def reconstruct(
    model: PyTree,
    data: Dataset,
    loss: Loss,
    updates: Updates,
    *,
    steps: int,
    training: Int[np.ndarray, " fitted"] | None = None,
    held_out: Int[np.ndarray, " kept"] | None = None,
    batch_size: int | None = None,
    chunk: int = 64,
    patience: int | None = None,
    seed: int = 0,
    state: Any = None,
    done: int = 0,
    callback: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Minimise `loss(model, batch)` over the frames of `data`.

    **Arguments:** `training` frames are fitted (default: all but `held_out`); `held_out` frames are
    never fitted, only judged. `batch_size` None takes all training frames in every step, otherwise
    batches drawn anew in each epoch from `seed`. `patience` stops the run when the held-out
    deviance has not fallen for so many steps; the best model and its state are then returned, also
    where all `steps` are done. `state` of an earlier `Result` or `Step` continues its optimiser,
    and `done`, the steps it had taken, its batches and numbers. `callback` sees every step.

    **Returns:** a `Result`; its history has, a step, the `loss` over the batch before the step and
    the `deviance` per pixel, what `noise` alone allows of it, and the `r_factor` after it, of the
    held-out frames (`..._held_out`) and of as many training frames.

    **Raises:** ValueError for frames that do not exist or are both fitted and held out, `patience`
    without held-out frames, or a loss that is no longer a number.
    """
    training, held_out = chosen(len(data), training, held_out, patience)
    order, evaluate = ordered(model, training), make_evaluation(chunk)
    state = start(model, updates) if state is None else state
    watched = watch(data, order, held_out)
    rows = _batches(model, order, batch_size, seed, range(done, done + steps))
    part = None

    def take(at, model, state):
        nonlocal part
        row, due = next(rows), updates.at(at)
        if row is None and due.follows_frames():
            # What frames share changes as they move; out of order they would share little.
            row = ordered(model, training)
        part = part if row is None else batch(data, row)
        kept = (watched["_held_out"],) if "_held_out" in watched and due.follows_frames() else ()
        return make_step(loss, due, chunk)(model, state, part, *kept)

    numbers = range(done + 1, done + steps + 1)
    return followed(take, model, state, numbers, watched, evaluate, patience, callback)


def watch(
    data: Dataset, order: Int[np.ndarray, " training"], held_out: Int[np.ndarray, " held_out"]
) -> dict[str, Batch]:
    """The frames by which a run is judged: those held out, and as many training frames."""
    watched = {"": spread(order, max(len(held_out), 1)), "_held_out": held_out}
    return {name: batch(data, index) for name, index in watched.items() if len(index)}


def followed(
    take: Callable[[int, PyTree, Any], tuple[PyTree, Any, Float[Array, ""]]],
    model: PyTree,
    state: Any,
    numbers: range,
    watched: dict[str, Batch],
    evaluate: Callable[[PyTree, Batch], dict[str, Float[Array, ""]]],
    patience: int | None,
    callback: Callable[[Step], None],
) -> Result:
    """Steps of these `numbers`, each judged by the frames `watched`; stops as `reconstruct`."""
    history: dict[str, list[float]] = {}
    best = Best(model, state)
    for at in numbers:
        model, state, value = take(at, model, state)
        _record(history, {"loss": _number(value, at)}, "")
        for suffix, frames in watched.items():
            _record(history, evaluate(model, frames), suffix)
        callback(Step(at, model, state, history))
        if patience is not None:
            best = best.or_else(model, state, history["deviance_held_out"][-1])
            if best.since >= patience:
                break
    if patience is not None:
        model, state = best.model, best.state
    return Result(model, history, state)


class Best(NamedTuple):
    """The model of the lowest held-out deviance so far, and how many steps ago that was."""

    model: PyTree
    state: Any
    deviance: float = math.inf
    since: int = 0

    def or_else(self, model: PyTree, state: Any, deviance: float) -> "Best":
        """After one more step."""
        if deviance < self.deviance:
            return Best(model, state, deviance)
        return self._replace(since=self.since + 1)


def chosen(
    frames: int,
    training: Int[np.ndarray, " fitted"] | None,
    held_out: Int[np.ndarray, " kept"] | None,
    patience: int | None,
) -> tuple[Int[np.ndarray, " training"], Int[np.ndarray, " held_out"]]:
    """The frames to fit and those to judge by, checked."""
    held_out = np.zeros(0, int) if held_out is None else np.asarray(held_out)
    if training is None:
        training = np.setdiff1d(np.arange(frames), held_out)
    training = np.asarray(training)
    both = np.intersect1d(training, held_out)
    if len(both):
        raise ValueError(
            f"`reconstruct`: {len(both)} frames are in `training` and in `held_out` (first: "
            f"{both[0]}); a frame is either fitted or judged by."
        )
    if patience is not None and len(held_out) == 0:
        raise ValueError(
            f"`reconstruct`: `patience` {patience} needs `held_out` frames to judge the model by."
        )
    named = np.concatenate([training, held_out])
    if len(training) == 0 or named.min() < 0 or named.max() >= frames:
        raise ValueError(
            f"`reconstruct`: frames {sorted({*named[:1], *named[-1:]})} ... of {frames} are asked "
            f"for, {len(training)} of them to be fitted; at least one is needed, and numbers from "
            f"0 to {frames - 1}."
        )
    return training, held_out


def _number(value: Float[Array, ""], step: int) -> float:
    """A loss that is still a number."""
    if not np.isfinite(value):
        raise ValueError(
            f"`reconstruct`: the loss became {value} at step {step}. Try a smaller step or another "
            "noise model, and look for frames that hold NaN."
        )
    return float(value)


def _record(history: dict[str, list[float]], values: dict[str, Any], suffix: str) -> None:
    """Append what was found to the history."""
    for name, value in values.items():
        history.setdefault(name + suffix, []).append(float(value))


def spread(order: Int[np.ndarray, " frames"], count: int) -> Int[np.ndarray, " some"]:
    """`count` frames at equal distances along `order`."""
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]


def _batches(
    model, order, batch_size: int | None, seed: int, steps: range
) -> Iterator[Int[np.ndarray, " batch"] | None]:
    """The frames of each step, in epochs drawn without replacement; None: those of the last."""
    if batch_size is None or batch_size >= len(order):
        yield from islice(chain([order], repeat(None)), len(steps))
        return
    if batch_size < 1:
        raise ValueError(f"`reconstruct`: `batch_size` {batch_size} is less than one frame.")
    rng = np.random.default_rng(seed)
    rows = (row for _ in count() for row in draw(model, order, batch_size, rng))
    yield from islice(rows, steps.start, steps.stop)
