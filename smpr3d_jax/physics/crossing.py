"""Waves of many frames through thin slices of a field, and the way back, at the cost of the FFTs.

Slice s multiplies a wave by its transmission, and free space to the next slice multiplies the
wave's spectrum by a propagator. On a CPU one wave after another goes through all slices while it is
in cache; accelerators take all frames together. The reverse pass adds into the field in place and
uses the waves that the forward pass met; `keep` False computes them again instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int, PyTree

from .fourier import fft, ifft


See = Callable[..., Float[Array, ""]]
"""A number from what all frames share, an exit wave (states y x), and what is the frame's own."""


class Sway(NamedTuple):
    """Factors of each frame's own propagators along ky and kx, for tilts frame by frame."""

    along_y: Complex[Array, "frames gaps ky"]
    along_x: Complex[Array, "frames gaps kx"]


class _Wanted(NamedTuple):
    """Cotangents that somebody asked for."""

    waves: bool
    plates: bool
    steps: bool


jax.tree_util.register_static(_Wanted)


def through_slices(
    waves: Complex[Array, "rows states y x"],
    plates: Complex[Array, "slices fy fx"],
    steps: Complex[Array, "gaps y x"],
    sway: Sway | None,
    row: Int[Array, " frames"],
    corner: Int[Array, "frames 2"],
    keep: bool = True,
) -> Complex[Array, "frames states y x"]:
    """The waves behind the last slice of frames whose windows begin at `corner` (pixels).

    Frame j enters the first slice with `waves[row[j]]`; frames may share a row. There is a gap less
    than there are slices. `keep` the waves between the slices for the reverse pass, which takes
    frames x states x slices windows of memory, or compute them twice.
    """
    return _through(keep, waves, plates, steps, sway, row, corner)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(keep, waves, plates, steps, sway, row, corner):
    return _forward(False, waves, plates, steps, sway, row, corner)[0]


def _forward(keep, *operands):
    """Exit waves, and the waves before each slice (or nothing)."""
    together = partial(_forward_groups, keep, False)
    return jax.lax.platform_dependent(
        *operands, cpu=partial(_forward_groups, keep, True), default=together
    )


def _forward_groups(keep, alone, waves, plates, steps, sway, row, corner):
    count, states = row.shape[0], waves.shape[1]
    waves, frames = _grouped(alone, waves, sway, row, corner)

    def group(frames):
        row, corner, sway = frames
        wave, before = _cross(waves[row], plates, steps, sway, corner)
        return wave, before if keep else None

    leave, before = jax.lax.map(group, frames)
    shape = leave.shape[-2:]
    leave = leave.reshape(count, states, *shape)
    if before is None:
        return leave, None
    earlier, last = jnp.moveaxis(before[0], 1, 3), before[1]
    # Frames first, the same shapes on all platforms.
    return leave, (earlier.reshape(count, states, *earlier.shape[-3:]), last.reshape(leave.shape))


def _grouped(alone, waves, sway, row, corner):
    """Groups of frames, as `lax.map` wants them: single waves, or all frames in one group."""
    if not alone:
        return waves, jax.tree.map(lambda a: a[None], (row, corner, sway))
    states = waves.shape[1]
    each = jnp.arange(states, dtype=row.dtype)
    row = (row[:, None] * states + each[None]).reshape(-1, 1)
    repeated = lambda a: jnp.repeat(a, states, axis=0)[:, None]
    corner, sway = jax.tree.map(repeated, (corner, sway))
    return waves.reshape(-1, 1, *waves.shape[2:]), (row, corner, sway)


def _cross(wave, plates, steps, sway, corner):
    """Through all slices: what leaves, and the waves before each slice and before the last."""
    count, shape = plates.shape[0], wave.shape[-2:]

    def cross(wave, s):
        leaving = wave * _cut(plates, s, corner, shape)[:, None]
        return ifft(fft(leaving) * _factor(steps, sway, s)), wave

    last, before = _over_gaps(cross, wave, jnp.arange(count - 1, dtype=jnp.int32))
    leave = last * _cut(plates, jnp.asarray(count - 1, jnp.int32), corner, shape)[:, None]
    return leave, (before, last)


def _over_gaps(cross, wave, gaps):
    """A loop that a single slice, which has no gap to index, need not trace."""
    if len(gaps) == 0:
        return wave, jnp.zeros((0, *wave.shape), wave.dtype)
    return jax.lax.scan(cross, wave, gaps)


def _cut(plates, s, corner, shape):
    """The windows of slice `s` that begin at `corner`."""
    cut = lambda at: jax.lax.dynamic_slice(plates, (s, at[0], at[1]), (1, *shape))[0]
    return cut(corner[0])[None] if corner.shape[0] == 1 else jax.vmap(cut)(corner)


def _factor(steps, sway, s):
    step = jax.lax.dynamic_index_in_dim(steps, s, 0, keepdims=False)[None, None]
    if sway is None:
        return step
    along_y, along_x = (jax.lax.dynamic_index_in_dim(a, s, 1, keepdims=False) for a in sway)
    return step * along_y[:, None, :, None] * along_x[:, None, None, :]


def _through_forward(keep, waves, plates, steps, sway, row, corner):
    swaying = any(leaf.perturbed for leaf in jax.tree.leaves(sway, is_leaf=_is_primal))
    wanted = _Wanted(waves.perturbed, plates.perturbed, steps.perturbed or swaying)
    value = lambda tree: jax.tree.map(lambda p: p.value, tree, is_leaf=_is_primal)
    operands = value((waves, plates, steps, sway, row, corner))
    leave, before = _forward(keep, *operands)
    return leave, (wanted, before, operands)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _through_reverse(keep, saved, cotangent):
    wanted, before, operands = saved
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return *jax.tree.map(jnp.zeros_like, operands[:4]), None, None
    found = jax.lax.platform_dependent(
        cotangent, before, *operands,
        cpu=partial(_reverse_groups, wanted, True), default=partial(_reverse_groups, wanted, False),
    )  # fmt: skip
    return *found, None, None


_through.defvjp(_through_forward, _through_reverse, symbolic_zeros=True)


def _reverse_groups(wanted, alone, cotangent, before, waves, plates, steps, sway, row, corner):
    """Cotangents of waves, plates, steps and sway; zero where they are not wanted."""
    count, states, like = row.shape[0], waves.shape[1], waves
    waves, frames = _grouped(alone, waves, sway, row, corner)
    own = (count * states, 1, 1) if alone else (1, count, states)
    split = lambda a: a.reshape(*own, *a.shape[2:])
    coming = split(cotangent)
    if before is not None:
        before = jnp.moveaxis(split(before[0]), 3, 1), split(before[1])

    def group(totals, given):
        (row, corner, sway), coming, before = given
        if before is None:
            _, before = _cross(waves[row], plates, steps, sway, corner)
        to_waves, to_plates, to_steps = totals
        coming, to_plates, to_steps, to_sway = _back(
            wanted, coming, before, plates, steps, sway, corner, to_plates, to_steps
        )
        if wanted.waves:
            to_waves = to_waves.at[row].add(coming)
        return (to_waves, to_plates, to_steps), to_sway

    totals = jax.tree.map(jnp.zeros_like, (waves, plates, steps))
    (to_waves, to_plates, to_steps), to_sway = jax.lax.scan(group, totals, (frames, coming, before))
    if sway is not None:
        per_frame = states if alone else 1
        to_sway = jax.tree.map(lambda a: _whole(a, per_frame), to_sway)
    return to_waves.reshape(like.shape), to_plates, to_steps, to_sway


def _whole(sway, states):
    """(groups members gaps k) -> (frames gaps k), the states of a frame added."""
    frames = sway.shape[0] * sway.shape[1] // states
    return jnp.sum(sway.reshape(frames, states, *sway.shape[-2:]), axis=1)


def _back(wanted, coming, before, plates, steps, sway, corner, to_plates, to_steps):
    """One group of frames, from behind the last slice to before the first."""
    count, shape = plates.shape[0], coming.shape[-2:]

    def plate(coming, s, wave, to_plates):
        if wanted.plates:
            to_plates = _put(to_plates, s, corner, jnp.sum(coming * wave, axis=1))
        return coming * _cut(plates, s, corner, shape)[:, None], to_plates

    def cross(carry, given):
        coming, to_plates, to_steps = carry
        s, wave = given
        # A transform is its own transpose, which is what JAX calls a cotangent's way back.
        spectrum, to_sway = ifft(coming), None
        if wanted.steps:
            leaving = fft(wave * _cut(plates, s, corner, shape)[:, None])
            to_factor = jnp.sum(leaving * spectrum, axis=1)
            step, to_sway = _to_factors(to_factor, steps, sway, s)
            to_steps = to_steps.at[s].add(step)
        elif sway is not None:
            to_sway = jax.tree.map(lambda a: jnp.zeros_like(a[:, 0]), sway)
        coming = fft(spectrum * _factor(steps, sway, s))
        coming, to_plates = plate(coming, s, wave, to_plates)
        return (coming, to_plates, to_steps), to_sway

    before, last = before
    coming, to_plates = plate(coming, jnp.asarray(count - 1, jnp.int32), last, to_plates)
    given = jnp.arange(count - 1, dtype=jnp.int32), before
    carry = (coming, to_plates, to_steps)
    if count == 1:
        return *carry, jax.tree.map(jnp.zeros_like, sway)
    (coming, to_plates, to_steps), to_sway = jax.lax.scan(cross, carry, given, reverse=True)
    if sway is not None:
        to_sway = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), to_sway)
    return coming, to_plates, to_steps, to_sway


def _to_factors(to_factor, steps, sway, s):
    """From the cotangent of each frame's factor to those of what it is made of."""
    if sway is None:
        return jnp.sum(to_factor, axis=0), None
    step = jax.lax.dynamic_index_in_dim(steps, s, 0, keepdims=False)
    own = tuple(jax.lax.dynamic_index_in_dim(a, s, 1, keepdims=False) for a in sway)
    make = lambda step, own: step[None] * own[0][:, :, None] * own[1][:, None, :]
    step, own = jax.vjp(make, step, own)[1](to_factor)
    return step, Sway(*own)


def _put(total, s, corner, part):
    """Adds windows to slice `s` of a field, in place."""
    if corner.shape[0] > 1:
        cut = lambda total: _cut(total, s, corner, part.shape[1:])
        return total + jax.linear_transpose(cut, total)(part)[0]
    start = (s, corner[0, 0], corner[0, 1])
    there = jax.lax.dynamic_slice(total, start, (1, *part.shape[1:]))
    return jax.lax.dynamic_update_slice(total, there + part, start)


def mean_seen(
    see: See,
    given: PyTree,
    waves: Complex[Array, "rows states y x"],
    plates: Complex[Array, "slices fy fx"],
    steps: Complex[Array, "gaps y x"],
    sway: Sway | None,
    row: Int[Array, " frames"],
    corner: Int[Array, "frames 2"],
    own: PyTree,
    keep: bool = True,
) -> Float[Array, ""]:
    """Mean over frames of `see(given, wave, own)`, a number for each frame's exit wave.

    `own` has an entry for each frame. The same as `through_slices` and `see` one after the other;
    where a gradient is asked for, a CPU takes each frame there and back while it is in cache.
    """
    one = jax.tree.map(lambda a: a[0], own)
    wave = jax.ShapeDtypeStruct(waves.shape[1:], waves.dtype)
    # What `see` has closed over may be differentiated as well.
    see, hidden = jax.closure_convert(see, given, wave, one)
    given, own = ((*eqx.partition(tree, eqx.is_inexact_array),) for tree in ((given, hidden), own))
    whole = lambda given, wave, own: _see(see, given, wave, own)
    operands = (given[0], waves, plates, steps, sway, own[0])
    return _mean_seen(whole, keep, *operands, (given[1], own[1], row, corner))


def _see(see, given, wave, own):
    (given, hidden), own = eqx.combine(*given), eqx.combine(*own)
    return see(given, wave, own, *hidden)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mean_seen(see, keep, given, waves, plates, steps, sway, own, fixed):
    return _plain_mean(see, keep, (given, waves, plates, steps, sway, own), fixed)


def _plain_mean(see, keep, free, fixed):
    """The mean by one after the other, which is derivable."""
    given, waves, plates, steps, sway, own = free
    more, others, row, corner = fixed
    leave = through_slices(waves, plates, steps, sway, row, corner, keep)
    look = lambda wave, own, other: see((given, more), wave, (own, other))
    return jnp.mean(jax.vmap(look)(leave, own, others))


def _mean_seen_forward(see, keep, *operands):
    flags = [
        any(leaf.perturbed for leaf in jax.tree.leaves(part, is_leaf=_is_primal))
        for part in operands
    ]
    _, waves, plates, steps, sway, _, _ = flags
    wanted = _Wanted(waves, plates, steps or sway)
    operands = jax.tree.map(lambda p: p.value, operands, is_leaf=_is_primal)
    *free, fixed = operands
    derived = lambda *free: jax.value_and_grad(partial(_plain_mean, see, keep))(free, fixed)
    there_and_back = lambda *free: _there_and_back(see, wanted, free, fixed)
    return jax.lax.platform_dependent(*free, cpu=there_and_back, default=derived)


def _mean_seen_reverse(see, keep, slopes, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return *jax.tree.map(jnp.zeros_like, slopes), None
    return *jax.tree.map(lambda a: a * cotangent.astype(a.dtype), slopes), None


_mean_seen.defvjp(_mean_seen_forward, _mean_seen_reverse, symbolic_zeros=True)


def _there_and_back(see, wanted, free, fixed):
    """The mean, and its slopes (as JAX's reverse pass has them), frame after frame."""
    given, waves, plates, steps, sway, own = free
    more, others, row, corner = fixed
    share = 1 / row.shape[0]

    def frame(totals, frame):
        row, corner, sway, own, other = frame
        corner, sway = jax.tree.map(lambda a: a[None], (corner, sway))
        # One loop a state: stacking what lies between the slices would copy all of it.
        ways = [_cross(wave[None, None], plates, steps, sway, corner) for wave in waves[row]]
        leave = jnp.stack([wave[0, 0] for wave, _ in ways])
        look = lambda given, wave, own: see((given, more), wave, (own, other))
        value, pull = jax.vjp(look, given, leave, own)
        to_given, coming, to_own = pull(jnp.full_like(value, share))

        mean, to_given_all, to_waves, *field = totals
        entering, swaying = [], []
        for wave, (_, before) in zip(coming, ways, strict=True):
            wave, *field, to_sway = _back(
                wanted, wave[None, None], before, plates, steps, sway, corner, *field
            )
            entering.append(wave[0, 0])
            swaying.append(to_sway)
        to_sway = jax.tree.map(lambda *a: jnp.sum(jnp.stack(a), axis=(0, 1)), *swaying)
        if wanted.waves:
            to_waves = to_waves.at[row].add(jnp.stack(entering))
        to_given = jax.tree.map(jnp.add, to_given_all, to_given)
        return (mean + share * value, to_given, to_waves, *field), (to_sway, to_own)

    real = jnp.zeros((), jnp.finfo(waves.dtype).dtype)
    totals = (real, *jax.tree.map(jnp.zeros_like, (given, waves, plates, steps)))
    frames = (row, corner, sway, own, others)
    (mean, *slopes), (to_sway, to_own) = jax.lax.scan(frame, totals, frames)
    return mean, (*slopes, to_sway, to_own)


@jax.custom_vjp
def moved(
    spectra: Complex[Array, "scans states ky kx"],
    along_y: Complex[Array, "frames ky"],
    along_x: Complex[Array, "frames kx"],
    scan: Int[Array, " frames"],
) -> Complex[Array, "frames states y x"]:
    """Each frame's own copy of its scan's waves, shifted by Fourier phases."""
    return _moved(spectra, along_y, along_x, scan)


def _moved(spectra, along_y, along_x, scan):
    def one(frame):
        along_y, along_x, scan = frame
        return ifft(spectra[scan] * along_y[None, :, None] * along_x[None, None, :])

    in_turn = lambda *frames: jax.lax.map(one, frames)
    together = lambda *frames: jax.vmap(lambda *frame: one(frame))(*frames)
    return jax.lax.platform_dependent(along_y, along_x, scan, cpu=in_turn, default=together)


def _moved_reverse(saved, cotangent):
    spectra, along_y, along_x, scan = saved

    def frame(total, given):
        to, along_y, along_x, scan = given
        to = ifft(to)
        make = lambda y, x: y[:, None] * x[None, :]
        ramp, pull = jax.vjp(make, along_y, along_x)
        to_y, to_x = pull(jnp.sum(to * spectra[scan], axis=0))
        return total.at[scan].add(to * ramp[None]), (to_y, to_x)

    frames = (cotangent, along_y, along_x, scan)
    total, (to_y, to_x) = jax.lax.scan(frame, jnp.zeros_like(spectra), frames)
    return total, to_y, to_x, None


moved.defvjp(lambda *operands: (_moved(*operands), operands), _moved_reverse)
