"""Stochastic reconstruction: epochs of small batches, each epoch one compiled loop.

Every epoch visits all training frames once, in batches drawn anew from the seed. What is common to
all frames moves after each batch; what frames have of their own (`Updates.own`: positions, weights)
moves once an epoch, by the gradient collected over it. Then constraints are applied and the model
is judged.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from ..data.dataset import batch, Dataset
from .batches import groups
from .losses import Loss
from .reconstruction import (
    advance,
    chosen,
    followed,
    make_evaluation,
    moved,
    refreshed,
    Result,
    slopes,
    start,
    Step,
    watch,
)
from .updates import named_leaves, Updates


Constraint = Callable[[PyTree], PyTree]
"""A model, made to obey: see `constraints`."""
Grouping = Literal["random", "compact", "hilbert"]


def reconstruct_in_epochs(
    model: PyTree,
    data: Dataset,
    loss: Loss,
    updates: Updates,
    *,
    epochs: int,
    batch_size: int = 32,
    grouping: Grouping = "random",
    constraints: Sequence[Constraint] = (),
    training: Int[np.ndarray, " fitted"] | None = None,
    held_out: Int[np.ndarray, " kept"] | None = None,
    patience: int | None = None,
    seed: int = 0,
    state: Any = None,
    done: int = 0,
    callback: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Minimise `loss(model, batch)` by epochs of batches.

    **Arguments:** as those of `reconstruct`, whose steps are epochs here. `grouping` of the
    batches: "random" (frames from anywhere, which wins on most data), "compact" (neighbours, whose
    steps touch one place) or "hilbert" (each batch spread evenly over the scan). Frames that do
    not fill a batch go with another epoch. `constraints` are applied to the model after each
    epoch, in their order.

    **Returns:** a `Result`; its history has, an epoch, the mean `loss` over its batches, each
    before its step, and what `reconstruct` has of figures of merit, after the constraints.

    **Raises:** ValueError as `reconstruct`, or for a batch size of less than 1 or more than there
    are training frames.
    """
    training, held_out = chosen(len(data), training, held_out, patience)
    if not 1 <= batch_size <= len(training):
        raise ValueError(
            f"`reconstruct_in_epochs`: batch_size {batch_size} must lie between 1 and the "
            f"{len(training)} training frames."
        )
    state = start(model, updates) if state is None else state
    watched = watch(data, training, held_out)
    positions = np.asarray(data.scan.positions, float)

    def take(at, model, state):
        rng, due = np.random.default_rng((seed, at)), updates.at(at)
        rows = jnp.asarray(groups(positions, training, batch_size, grouping, rng), jnp.int32)
        aside = watched.get("_held_out") if due.follows_frames() else None
        model, state, value = _epoch(loss, due, model, state, data, rows, aside)
        return _constrained(tuple(constraints), due, model), state, value

    numbers, evaluate = range(done + 1, done + epochs + 1), make_evaluation(batch_size)
    return followed(take, model, state, numbers, watched, evaluate, patience, callback)


@eqx.filter_jit
def _epoch(loss, updates, model, state, data, rows, aside):
    """All batches of an epoch, then a step of what frames have of their own."""
    common, own = _split(updates, model)
    varying, fixed = eqx.partition((model, state), eqx.is_array)
    gathered = jax.tree.map(jnp.zeros_like, eqx.filter(model, own.free(model)))
    share = rows.shape[1] / (rows.size + (0 if aside is None else len(aside.index)))

    def one(carry, row):
        varying, gathered = carry
        model, state = eqx.combine(varying, fixed)
        frames = batch(data, row)
        if not own.moving:
            model, state, value = advance(loss, common, rows.shape[1], model, state, frames)
        else:
            value, gradient, value_of = slopes(loss, updates, rows.shape[1], model, frames)
            mine = eqx.filter(gradient, own.free(model))
            gathered = jax.tree.map(lambda a, g: a + share * g, gathered, mine)
            if common.moving:
                model, state = moved(common, model, state, gradient, value, value_of, row)
        return (eqx.filter((model, state), eqx.is_array), gathered), value

    (varying, gathered), values = jax.lax.scan(one, (varying, gathered), rows)
    model, state = eqx.combine(varying, fixed)
    value = jnp.mean(values)
    if own.moving:
        if aside is not None:
            _, more, _ = slopes(loss, own, rows.shape[1], model, aside)
            part = len(aside.index) * share / rows.shape[1]
            gathered = jax.tree.map(lambda a, g: a + part * g, gathered, more)
        unknown = lambda free: value
        model, state = moved(own, model, state, gathered, value, unknown, rows.reshape(-1))
    return model, state, value


def _split(updates: Updates, model) -> tuple[Updates, Updates]:
    """The updates of what is common, and of what frames have of their own.

    **Raises:** ValueError where one optimiser has both, which would move at different times.
    """
    whose = {}
    for name in updates.moving:
        leaves = named_leaves(eqx.filter(model, updates._replace(moving=(name,)).free(model)))
        kinds = {path in updates.own for path, leaf in leaves.items() if leaf is not None}
        if len(kinds) > 1:
            raise ValueError(
                f"`reconstruct_in_epochs`: one optimiser moves {name!r}, some of which is each "
                "frame's own and moves once an epoch; give it an optimiser of its own."
            )
        whose[name] = True in kinds
    pick = lambda kind: updates._replace(moving=tuple(n for n, k in whose.items() if k == kind))
    return pick(False), pick(True)


@eqx.filter_jit
def _constrained(constraints, updates, model):
    for constraint in constraints:
        model = constraint(model)
    return refreshed(model, updates.free(model)) if constraints else model
