"""The optimisation loop; it knows no physics and no files.

`make_step` is one compiled step, `reconstruct` the loop around it. The loss is a mean over the
frames of a batch; a large batch is differentiated chunk by chunk and averaged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..data.dataset import Batch, batch, Dataset
from .batches import chunks, ordered
from .losses import figures_of_merit, Loss
from .updates import Updates


class Result(NamedTuple):
    """The model found, the history of the run, and what is needed to go on."""

    model: PyTree
    history: dict[str, list[float]]
    state: Any


class Step(NamedTuple):
    """What a callback is told after each step."""

    number: int
    model: PyTree
    state: Any
    history: dict[str, list[float]]


def mean_over_chunks(
    function: Callable[[Batch], PyTree], frames: Batch, chunk: int
) -> PyTree:
    """Average over frames of a function that is itself a mean over the frames it is given."""
    size = frames.index.shape[0]
    rows, rest = size // chunk, size % chunk
    total = None
    if rows:
        first = jax.tree.map(lambda a: a[: rows * chunk].reshape(rows, chunk, *a.shape[1:]), frames)
        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(function, jax.tree.map(lambda a: a[0], first)),
        )
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None)
        total = jax.tree.map(
            lambda a: a * (chunk / size), jax.lax.scan(add, zero, first)[0]
        )
    if rest:
        last = function(jax.tree.map(lambda a: a[rows * chunk :], frames))
        last = jax.tree.map(lambda a: a * (rest / size), last)
        total = last if total is None else jax.tree.map(jnp.add, total, last)
    return total


def make_step(loss: Loss, updates: Updates, chunk: int = 64) -> Callable:
    """One compiled step: `(model, state, batch) -> (model, state, value)`.

    Only the leaves that `updates` names are differentiated. The loss, its gradient and a function
    of the free leaves are handed on to optax, as its line searches want them.
    """

    @eqx.filter_jit
    def step(model, state, batch):
        free, fixed = eqx.partition(model, updates.free(model))

        def value_of(free, part):
            return loss(eqx.combine(free, fixed), part)

        value, gradient = mean_over_chunks(
            lambda part: jax.value_and_grad(value_of)(free, part), batch, chunk
        )
        # JAX's gradient of a complex leaf is the conjugate of the direction of ascent.
        gradient = jax.tree.map(jnp.conj, gradient)
        whole = lambda free: mean_over_chunks(lambda part: value_of(free, part), batch, chunk)
        move, state = updates.transform.update(
            gradient, state, free, value=value, grad=gradient, value_fn=whole
        )
        return eqx.combine(eqx.apply_updates(free, move), fixed), state, value

    return step


def make_evaluation(chunk: int = 64) -> Callable:
    """Compiled figures of merit of `(model, batch)`: deviance per pixel and R-factor."""

    @eqx.filter_jit
    def evaluate(model, batch):
        part = lambda b: jax.tree.map(jnp.mean, figures_of_merit(model, b))
        sums = mean_over_chunks(part, batch, chunk)
        pixels = np.prod(batch.counts.frame_shape)
        return {
            "deviance": sums["deviance"] / jnp.asarray(pixels, sums["deviance"].dtype),
            "r_factor": sums["misfit"] / sums["amplitude"],
        }

    return evaluate


def start(model: PyTree, updates: Updates) -> Any:
    """The optimiser's state before the first step."""
    return updates.transform.init(eqx.filter(model, updates.free(model)))


def reconstruct(
    model: PyTree,
    data: Dataset,
    loss: Loss,
    updates: Updates,
    *,
    steps: int,
    training: Int[np.ndarray, " frames"] | None = None,
    held_out: Int[np.ndarray, " frames"] | None = None,
    batch_size: int | None = None,
    chunk: int = 64,
    patience: int | None = None,
    seed: int = 0,
    state: Any = None,
    callback: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Minimise `loss(model, batch)` over the frames of `data`.

    **Arguments:** `training` frames are fitted (default: all but `held_out`); `held_out` frames are
    never fitted, only judged. `batch_size` None takes all training frames in every step, otherwise
    batches drawn anew in each epoch from `seed`. `patience` stops the run when the held-out
    deviance has not fallen for so many steps, and the best model is returned. `state` of an earlier
    `Result` continues its optimiser. `callback` sees every step.

    **Raises:** ValueError where the loss is no longer a number.
    """
    held_out = np.zeros(0, int) if held_out is None else np.asarray(held_out)
    if training is None:
        training = np.setdiff1d(np.arange(len(data)), held_out)
    order = ordered(model, training)
    step, evaluate = make_step(loss, updates, chunk), make_evaluation(chunk)
    state = start(model, updates) if state is None else state
    watched = {"": _spread(order, max(len(held_out), 1)), "_held_out": held_out}
    watched = {name: batch(data, index) for name, index in watched.items() if len(index)}
    history: dict[str, list[float]] = {}
    best, since = (np.inf, model), 0
    for number, part in enumerate(_batches(data, order, batch_size, steps, seed), 1):
        model, state, value = step(model, state, part)
        if not np.isfinite(value):
            raise ValueError(
                f"`reconstruct`: the loss became {value} at step {number}; a smaller step or "
                "another noise model may help, and frames with NaN are to be looked for."
            )
        _record(history, {"loss": float(value)}, "")
        for suffix, frames in watched.items():
            _record(history, evaluate(model, frames), suffix)
        callback(Step(number, model, state, history))
        if patience is not None and "deviance_held_out" in history:
            since += 1
            if history["deviance_held_out"][-1] < best[0]:
                best, since = (history["deviance_held_out"][-1], model), 0
            if since >= patience:
                break
    return Result(model if patience is None else best[1], history, state)


def _record(history, values, suffix: str):
    for name, value in values.items():
        history.setdefault(name + suffix, []).append(float(value))


def _spread(order, count: int):
    """`count` frames at equal distances along `order`."""
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]


def _batches(data, order, batch_size, steps: int, seed: int):
    """All frames every time, or epochs of batches drawn without replacement."""
    if batch_size is None or batch_size >= len(order):
        whole = batch(data, order)
        yield from (whole for _ in range(steps))
        return
    rng, blocks = np.random.default_rng(seed), chunks(order, batch_size)[0]
    picks = (i for _ in range(steps) for i in rng.permutation(len(blocks)))
    for _, pick in zip(range(steps), picks, strict=False):
        yield batch(data, blocks[pick])
