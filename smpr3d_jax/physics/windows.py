"""The sum of modes times window of each frame, and its reverse passes.

The exit wave of a frame is sum_p sigma_p(corner + m) beta_p(m), with beta from a row of a table. On
a CPU frame follows frame, which keeps what they share in cache; accelerators take them together.
Derived reverse passes of the former would write the whole field, or the whole table, once a frame;
the rules below add into the windows in place (measured: twelve times faster).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int


MODES_AT_ONCE = 5
"""Modes summed in one loop on CPUs; three to seven are equally fast."""


class Layout(NamedTuple):
    """What the rows of a table hold: `shape` pixels and `margin` pixels more on each side.

    On a ladder each axis has `per_pixel` rungs, `spacing` Å apart; rungs of x are `group` rows
    apart, those of y `per_pixel` times as many. Without one `per_pixel` is 0.
    """

    shape: tuple[int, int]
    margin: int = 0
    per_pixel: int = 0
    group: int = 1
    spacing: tuple[float, float] = (0.0, 0.0)


def inset(inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[int, int]:
    """Where the inner of two windows of one centre begins in the outer."""
    y, x = (m // 2 - n // 2 for n, m in zip(inner, outer, strict=True))
    return y, x


def window_of(
    waves: Complex[Array, "modes fy fx"], corner: Int[Array, "2"], shape: tuple[int, int]
) -> Complex[Array, "modes y x"]:
    """The pixels of `shape` that begin at `corner`."""
    start = (jnp.zeros((), corner.dtype), corner[0], corner[1])
    return jax.lax.dynamic_slice(waves, start, (waves.shape[0], *shape))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def exit_sum(
    layout: Layout,
    waves: Complex[Array, "modes fy fx"],
    values: Complex[Array, "rows modes y x"],
    halo: Complex[Array, "rows 1 Y X"] | None,
    corner: Int[Array, "frames 2"],
    entry: Int[Array, " frames"],
    rest: Float[Array, "frames 2"] | None,
) -> Complex[Array, "frames wy wx"]:
    """Exit waves of frames whose windows begin at `corner`, with the beamlets of row `entry`.

    Where there is a `halo`, they fill its window, with the first mode alone around the inner one.
    `rest` (Å) only carries a derivative: on a ladder, from the rungs on both sides.
    """
    return _forward(layout, waves, values, halo, corner, entry)


def _forward(layout, *operands):
    cpu, default = partial(frame_by_frame, layout), partial(frames_together, layout)
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=default)


def frames_together(layout, waves, values, halo, corner, entry):
    """`exit_sum` for all frames at once, derivable."""
    m, (y, x) = layout.margin, layout.shape
    windows = jax.vmap(lambda at: window_of(waves, at, layout.shape))(corner)
    inner = jnp.sum(windows * values[entry, :, m : m + y, m : m + x], axis=1)
    if halo is None:
        return inner
    around = jax.vmap(lambda at: _around(layout, waves, halo, at))(corner)
    y, x = around.shape[1:]
    around = around * halo[entry, 0, m : m + y, m : m + x]
    return around.at[:, *_inner(layout, halo)].set(inner)


def _wide(layout, halo):
    """The halo's window without its margin, and where the inner window begins in it."""
    y, x = (n - 2 * layout.margin for n in halo.shape[2:])
    return (y, x), inset(layout.shape, (y, x))


def _inner(layout, halo):
    """The inner window's part of the halo's."""
    _, low = _wide(layout, halo)
    return tuple(slice(a, a + n) for a, n in zip(low, layout.shape, strict=True))


def _around(layout, waves, halo, at):
    """The first mode in the halo's window of the frame whose inner window begins at `at`."""
    wide, low = _wide(layout, halo)
    return _mode(waves, 0, at - jnp.asarray(low, at.dtype), wide)


def frame_by_frame(layout, waves, values, halo, corner, entry):
    """`exit_sum` in a loop over frames."""

    def frame(where):
        at, row = where
        zero = jnp.zeros(layout.shape, waves.dtype)
        seen = lambda p: _mode(waves, p, at, layout.shape)
        (inner,) = _over_modes(
            lambda p: [seen(p) * _beamlet(layout, values, row, p, layout.shape)], [zero], waves
        )
        if halo is None:
            return inner
        around = _around(layout, waves, halo, at)
        around = around * _beamlet(layout, halo, row, 0, around.shape)
        return around.at[_inner(layout, halo)].set(inner)

    return jax.lax.map(frame, (corner, entry))


def _over_modes(term, totals, waves):
    """Sums of `term(p)` over modes, a few in one loop: XLA's vector code wants single slices.

    A sum over an axis is three times slower.
    """
    modes = waves.shape[0]
    whole = modes // MODES_AT_ONCE * MODES_AT_ONCE
    both = lambda totals, p: [a + b for a, b in zip(totals, term(p), strict=True)]

    def add(totals, first):
        for p in range(MODES_AT_ONCE):
            totals = both(totals, first + p)
        return totals, None

    if whole:
        firsts = jnp.arange(0, whole, MODES_AT_ONCE, dtype=jnp.int32)
        totals, _ = jax.lax.scan(add, totals, firsts)
    for p in range(whole, modes):
        totals = both(totals, jnp.asarray(p, jnp.int32))
    return totals


def _mode(waves, p, at, shape):
    start = (jnp.asarray(p, at.dtype), at[0], at[1])
    return jax.lax.dynamic_slice(waves, start, (1, *shape))[0]


def _beamlet(layout, table, row, p, shape):
    """Mode p of a row without its margin."""
    m = jnp.asarray(layout.margin, row.dtype)
    start = (row, jnp.asarray(p, row.dtype), m, m)
    return jax.lax.dynamic_slice(table, start, (1, 1, *shape))[0, 0]


def _beamlets(layout, table, shape, row, shift=(0, 0)):
    """All modes of a row without its margin, `shift` pixels further."""
    y, x = (jnp.asarray(layout.margin + s, row.dtype) for s in shift)
    start = (row, jnp.zeros((), row.dtype), y, x)
    return jax.lax.dynamic_slice(table, start, (1, table.shape[1], *shape))[0]


def _exit_sum_forward(layout, *operands):
    return _forward(layout, *operands[:-1]), operands


def _exit_sum_reverse(layout, saved, cotangent):
    # A call each, so that the cotangent that nobody asks for is not computed either.
    *operands, rest = saved
    choose = partial(jax.lax.platform_dependent, cotangent, *operands)
    derived = lambda *which: lambda *a: tuple(_derived(layout, *a)[i] for i in which)
    (to_waves,) = choose(cpu=partial(add_into_waves, layout), default=derived(0))
    to_values, to_halo = choose(cpu=partial(add_into_table, layout), default=derived(1, 2))
    to_rest = None
    if rest is not None:
        cpu, default = partial(slopes_in_turn, layout), partial(slopes, layout)
        to_rest = choose(cpu=cpu, default=default).astype(rest.dtype)
    return to_waves, to_values, to_halo, None, None, to_rest


exit_sum.defvjp(_exit_sum_forward, _exit_sum_reverse)


def _derived(layout, cotangent, waves, values, halo, corner, entry):
    function = lambda a, b, c: frames_together(layout, a, b, c, corner, entry)
    return jax.vjp(function, waves, values, halo)[1](cotangent)


def _parts(layout, halo, cotangent):
    """What comes back to the inner window of a frame, and to the halo's around it, if any."""
    if halo is None:
        return cotangent, cotangent
    inner = _inner(layout, halo)
    return cotangent[inner], cotangent.at[inner].set(0)


def add_into_waves(layout, cotangent, waves, values, halo, corner, entry):
    """Reverse pass of `frame_by_frame` with respect to `waves`."""

    def add(total, frame):
        at, row, to = frame
        inner, around = _parts(layout, halo, to)
        beamlets = _beamlets(layout, values, layout.shape, row)
        total = _add(total, at, beamlets * inner[None])
        if halo is not None:
            wide, low = _wide(layout, halo)
            part = _beamlet(layout, halo, row, 0, wide) * around
            total = _add(total, at - jnp.asarray(low, at.dtype), part[None])
        return total, None

    return (jax.lax.scan(add, jnp.zeros_like(waves), (corner, entry, cotangent))[0],)


def _add(total, at, part):
    """Adds `part` to the first modes of `total`, in place."""
    start = (jnp.zeros((), at.dtype), at[0], at[1])
    patch = jax.lax.dynamic_slice(total, start, part.shape) + part
    return jax.lax.dynamic_update_slice(total, patch, start)


def add_into_table(layout, cotangent, waves, values, halo, corner, entry):
    """Reverse pass of `frame_by_frame` with respect to `values` and `halo`."""

    def add_row(total, row, part):
        # A scatter: slices and updates of part of a row were three times slower.
        m, (y, x) = layout.margin, part.shape[1:]
        return total.at[row, :, m : m + y, m : m + x].add(part)

    def add(totals, frame):
        (at, row, to), (total, total_halo) = frame, totals
        inner, around = _parts(layout, halo, to)
        total = add_row(total, row, window_of(waves, at, layout.shape) * inner[None])
        if halo is not None:
            seen = _around(layout, waves, halo, at)
            total_halo = add_row(total_halo, row, (seen * around)[None])
        return (total, total_halo), None

    start = (jnp.zeros_like(values), None if halo is None else jnp.zeros_like(halo))
    return jax.lax.scan(add, start, (corner, entry, cotangent))[0]


def slopes(layout, cotangent, waves, values, halo, corner, entry):
    """Re sum_m cotangent(m) sum_p sigma_p(corner + m) d beta_p(m)/d rest, along y and x.

    From the rungs on both sides.
    """

    def frame(at, row, to):
        return _slope(layout, waves, halo, at, to, _rises(layout, values, halo, row))

    return jax.vmap(frame)(corner, entry, cotangent)


def slopes_in_turn(layout, cotangent, waves, values, halo, corner, entry):
    """`slopes` in a loop; frames in a row of which share a rung share what it costs to read it."""

    def frame(last, where):
        (known, rises), (at, row, to) = last, where
        anew = lambda _: _rises(layout, values, halo, row)
        # XLA copies nothing where what is kept is the second branch: a third faster.
        rises = jax.lax.cond(row != known, anew, lambda rises: rises, rises)
        return (row, rises), _slope(layout, waves, halo, at, to, rises)

    like = jax.eval_shape(lambda: _rises(layout, values, halo, entry[0]))
    none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    nowhere = jnp.asarray(-1, entry.dtype)
    return jax.lax.scan(frame, (nowhere, none), (corner, entry, cotangent))[1]


def _rises(layout, values, halo, row):
    """What beamlets, and those in the halo, gain along y and x, per Å, between the rungs beside."""

    def rise(table, shape, axis):
        above, below = (_beside(layout, row, axis, by) for by in (1, -1))
        gain = _beamlets(layout, table, shape, *above) - _beamlets(layout, table, shape, *below)
        return gain / (2 * layout.spacing[axis])

    inner = tuple(rise(values, layout.shape, axis) for axis in (0, 1))
    if halo is None:
        return inner, None
    wide, _ = _wide(layout, halo)
    return inner, tuple(rise(halo, wide, axis)[0] for axis in (0, 1))


def _slope(layout, waves, halo, at, to, rises):
    inner, around = rises
    weight, rim = _parts(layout, halo, to)

    def term(p):
        seen = weight * _mode(waves, p, at, layout.shape)
        return [_real(seen, jax.lax.dynamic_index_in_dim(rise, p, 0, False)) for rise in inner]

    sums = _over_modes(term, [jnp.zeros(layout.shape, waves.real.dtype)] * 2, waves)
    sums = [_total(s) for s in sums]
    if halo is not None:
        seen = rim * _around(layout, waves, halo, at)
        sums = [s + _total(_real(seen, rise)) for s, rise in zip(sums, around, strict=True)]
    return jnp.stack(sums)


def _real(a, b):
    """Re a b."""
    return a.real * b.real - a.imag * b.imag


def _beside(layout, row, axis: int, by: int):
    """The row of the next rung, and by how many pixels its window lies beside.

    After the last rung of a pixel comes the first of the next, whose beamlets lie a pixel further.
    """
    n = layout.per_pixel
    stride = layout.group * (n if axis == 0 else 1)
    following = row // stride % n + by
    over = (following >= n).astype(row.dtype) - (following < 0).astype(row.dtype)
    shift = (-over, 0) if axis == 0 else (0, -over)
    return row + (by - n * over) * stride, shift


def _total(image):
    """A sum over rows first, which is vector code; a sum over all is not."""
    return jnp.sum(jnp.sum(image, axis=0))
