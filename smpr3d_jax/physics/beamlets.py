"""Exit waves of tilt modes: tables of beamlets, and the sum of modes times window of each frame.

The exit wave of a frame is sum_p sigma_p(x + m) beta_p(m), with the beamlets
beta_p(m) = sum_h Psi(h) Q_p(h) exp(2 pi i h.(m - rho)) summed on a fine grid of h, so that the
probe is not repeated with the period of the window. Each incoherent state of the probe has its own
beamlets; in a table they follow each other.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .fourier import EXACT, phase_factor
from .grid import Grid
from .optics import aperture, Optics, pupil
from .smatrix import TiltModes
from .zernike import tilt_polynomials


MODES_AT_ONCE = 5
"""Modes summed in one loop on CPUs; three to seven are equally fast."""

OVERSAMPLING = 4
"""Period of the beamlets' Fourier sum in windows; what leaks from the next copy is below 1e-3."""

STRETCH = 1.05
"""A camera length may be wrong by so much: the fine grid of h reaches that far."""


class Table(eqx.Module):
    """Beamlets in the window, and around it those of the first mode alone.

    `halo` (None: nothing) covers the window of the camera's finer pattern and is 0 inside the
    other. What scatters there is little, but the probe's own tails must not end at the window:
    cut off, they would pull a refined defocus towards focus.
    """

    values: Complex[Array, "rows modes y x"]
    halo: Complex[Array, "rows 1 Y X"] | None


class Beamlets(eqx.Module):
    """Beamlets tabulated over sub-pixel remainders, for frames that share them.

    `entry` is the row of each frame's first state in `table`. Positions are rounded to the
    tabulated remainders, so that they carry no derivative.
    """

    table: Table
    entry: Int[Array, " frames"]


class Ladder(eqx.Module):
    """Beamlets of every scan on a ladder of sub-pixel remainders, for positions that move.

    A pixel has `per_pixel` rungs along each axis, and one more at both ends, so that differences
    of neighbours give the derivative with respect to the position; the value is that of the
    nearest rung. Rows are ordered by scan, y, x and state.
    """

    table: Table
    per_pixel: int = eqx.field(static=True)
    states: int = eqx.field(static=True)

    @property
    def strides(self) -> tuple[int, int]:
        """How many rows the next rung along (y, x) is away."""
        return (self.per_pixel + 2) * self.states, self.states

    def rows(
        self, series: Int[Array, " frames"], rest: Float[Array, "frames 2"], window: Grid
    ) -> Int[Array, " frames"]:
        """The row of the first state of each frame, `rest` (Å) off the centre of its pixel."""
        step = jnp.asarray(window.sampling, rest.dtype)
        rung = jnp.floor((rest / step[None] + 0.5) * self.per_pixel).astype(jnp.int32)
        rung = jnp.clip(rung, 0, self.per_pixel - 1) + 1
        y, x = self.strides
        scan = series * ((self.per_pixel + 2) * y)
        return scan + rung[:, 0] * y + rung[:, 1] * x


def rungs(window: Grid, per_pixel: int) -> list[Float[np.ndarray, " rungs"]]:
    """Remainders (Å) along y and x that a `Ladder` tabulates."""
    fraction = (np.arange(-1, per_pixel + 1) + 0.5) / per_pixel - 0.5
    return [fraction * step for step in window.sampling]


def beamlets(
    optics: Optics,
    specimen: TiltModes,
    window: Grid,
    dose: Float[Array, " scans"],
    rest_y: Float[Array, " ty"],
    rest_x: Float[Array, " tx"],
    stretch: Float[Array, ""] | None = None,
    period: Grid | None = None,
) -> Complex[Array, "scans ty tx states modes y x"]:
    """beta_p(m) of each scan and state for probes `rest_y`, `rest_x` Å off the window's centre.

    The probe is referred to the specimen's plane: exp(-i chi) exp(-i pi lambda plane h²). The sums
    over h factor into one matrix product along y and one along x. `stretch` is that of
    `Scattering`. The sum repeats itself after `OVERSAMPLING` of `period`, or of the window.
    """
    fine, spectrum = _illumination(optics, specimen, period or window, dose, stretch)
    return _synthesised(fine, spectrum, window, rest_y, rest_x)


def tabulated(
    optics: Optics,
    specimen: TiltModes,
    window: Grid,
    halo: Grid | None,
    dose: Float[Array, " scans"],
    rest_y: Float[Array, " ty"],
    rest_x: Float[Array, " tx"],
    stretch: Float[Array, ""] | None = None,
) -> Table:
    """`beamlets` in rows by scan, y, x and state, and those of the first mode in `halo` around."""
    fine, spectrum = _illumination(optics, specimen, window, dose, stretch)
    values = _synthesised(fine, spectrum, window, rest_y, rest_x)
    values = values.reshape(-1, *values.shape[4:])
    if halo is None:
        return Table(values, None)
    around = _synthesised(fine, spectrum[:, :, :1], halo, rest_y, rest_x)
    (top, left), (rows, columns) = _inset(window.shape, halo.shape), window.shape
    around = around.reshape(-1, *around.shape[4:])
    return Table(values, around.at[..., top : top + rows, left : left + columns].set(0))


def _inset(inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[int, int]:
    """Where the inner of two windows of one centre begins in the outer."""
    y, x = (m // 2 - n // 2 for n, m in zip(inner, outer, strict=True))
    return y, x


def _synthesised(fine, spectrum, window: Grid, rest_y, rest_x):
    """The sums over h in `window` for probes beside its centre."""
    ramps = []
    for axis, rest in enumerate((rest_y, rest_x)):
        pixel = np.arange(window.shape[axis]) - window.shape[axis] // 2
        # Whole turns are dropped on the host in float64; only the remainder is left to float32.
        turns = np.outer(pixel * window.sampling[axis], fine[axis])
        steady = phase_factor(jnp.asarray(2 * np.pi * (turns % 1.0), rest.dtype))
        shift = phase_factor(
            -2 * math.pi * rest[:, None] * jnp.asarray(fine[axis], rest.dtype)[None]
        )
        ramps.append(steady[None] * shift[:, None, :])
    rows = jnp.einsum("tmh,dsphk->dtspmk", ramps[0], spectrum, precision=EXACT)
    return jnp.einsum("dtspmk,unk->dtuspmn", rows, ramps[1], precision=EXACT)


def _illumination(optics: Optics, specimen: TiltModes, window: Grid, dose, stretch):
    """Fine frequencies inside the aperture and Psi_d(h) Q_p(h) there."""
    dtype = jax.tree.leaves(optics.aberrations)[0].dtype
    scale = 1.0 if stretch is None else stretch
    fine = []
    for length in window.extent:
        step = 1 / (OVERSAMPLING * length)
        reach = optics.cutoff * (1.0 if stretch is None else STRETCH)
        count = math.floor(reach / step) + 1
        fine.append(step * np.arange(-count, count + 1))
    ky, kx = fine[0][:, None], fine[1][None, :]
    amplitude = jnp.asarray(aperture(ky, kx, optics.cutoff / scale), dtype)
    samples = OVERSAMPLING**2 * window.shape[0] * window.shape[1]
    amplitude = amplitude / (jnp.linalg.norm(amplitude) * math.sqrt(samples))
    ky, kx = np.broadcast_arrays(ky, kx)
    modes = tilt_polynomials(specimen.order, np.stack([ky, kx], -1), specimen.cutoff)
    ky, kx = (jnp.asarray(k, dtype) * scale for k in (ky, kx))
    travel = math.pi * optics.wavelength * specimen.plane * (ky**2 + kx**2)
    wave = pupil(optics, ky, kx, amplitude) * phase_factor(-travel)[None, None]
    wave = wave * jnp.sqrt(dose)[:, None, None, None].astype(wave.dtype)
    weight = amplitude[None] * jnp.asarray(modes, dtype)
    return fine, wave[:, :, None] * weight.astype(wave.dtype)[None, None]


def ladder(
    optics: Optics,
    specimen: TiltModes,
    window: Grid,
    halo: Grid | None,
    dose: Float[Array, " scans"],
    stretch: Float[Array, ""] | None = None,
    per_pixel: int = 6,
) -> Ladder:
    """The ladder of every scan: what must be computed anew when the probe changes."""
    y, x = (jnp.asarray(r, dose.dtype) for r in rungs(window, per_pixel))
    table = tabulated(optics, specimen, window, halo, dose, y, x, stretch)
    return Ladder(table, per_pixel, optics.states)


def summed(
    waves: Complex[Array, "modes fy fx"],
    table: Table,
    corner: Int[Array, "frames 2"],
    entry: Int[Array, " frames"],
    step: Callable[..., Any] | None = None,
) -> Complex[Array, "frames Y X"]:
    """The exit waves of frames from a table, in the halo's window where there is one.

    `step` sums modes times windows: `apply_beamlets`, or another with the same first arguments.
    """
    apply = step or apply_beamlets
    inner = apply(waves, table.values, corner, entry)
    if table.halo is None:
        return inner
    top, left = _inset(inner.shape[1:], table.halo.shape[2:])
    start = corner - jnp.asarray([top, left], corner.dtype)[None]
    around = apply(waves[:1], table.halo, start, entry)
    rows, columns = inner.shape[1:]
    return around.at[:, top : top + rows, left : left + columns].add(inner)


def spread_levels(
    rest: Float[np.ndarray, " frames"], step: float, per_pixel: int
) -> tuple[Float[np.ndarray, " levels"], Int[np.ndarray, " frames"]]:
    """Distinct remainders along an axis (within 1/50 of a pixel), or a uniform ladder of them."""
    order = np.argsort(rest)
    cluster = np.zeros(len(rest), int)
    cluster[order[1:]] = np.cumsum(np.diff(rest[order]) > 0.02 * step)
    if (count := cluster.max() + 1) <= per_pixel:
        return np.bincount(cluster, rest) / np.bincount(cluster, minlength=count), cluster
    index = np.clip(np.floor((rest / step + 0.5) * per_pixel).astype(int), 0, per_pixel - 1)
    return ((np.arange(per_pixel) + 0.5) / per_pixel - 0.5) * step, index


@jax.custom_vjp
def apply_beamlets(
    waves: Complex[Array, "modes fy fx"],
    values: Complex[Array, "rows modes y x"],
    corner: Int[Array, "frames 2"],
    entry: Int[Array, " frames"],
) -> Complex[Array, "frames y x"]:
    """sum_p sigma_p(corner + m) beta_p(m): modes times window for each frame.

    On a CPU frame follows frame, which keeps what they share in cache; accelerators take them
    together. The derived reverse pass of the former would write the whole field once a frame; the
    rule below adds into the window in place (measured: twelve times faster).
    """
    return _apply(waves, values, corner, entry)


def _apply(*operands):
    return jax.lax.platform_dependent(*operands, cpu=frame_by_frame, default=frames_together)


def window_of(waves, corner, shape):
    start = (jnp.zeros((), corner.dtype), corner[0], corner[1])
    return jax.lax.dynamic_slice(waves, start, (waves.shape[0], *shape))


def frames_together(waves, values, corner, entry):
    """`apply_beamlets` as one sum over the windows of all frames, derivable."""
    windows = jax.vmap(lambda c: window_of(waves, c, values.shape[2:]))(corner)
    return jnp.sum(windows * values[entry], axis=1)


def frame_by_frame(waves, values, corner, entry):
    """`apply_beamlets` in a loop over frames, and in it over a few modes at once.

    XLA's vector code wants a sum of single slices; a sum over an axis is three times slower.
    """
    modes, shape = waves.shape[0], values.shape[2:]
    whole = modes // MODES_AT_ONCE * MODES_AT_ONCE

    def frame(where):
        corner, row = where
        zero = jnp.zeros((), corner.dtype)

        def term(p):
            wave = jax.lax.dynamic_slice(waves, (p, corner[0], corner[1]), (1, *shape))
            value = jax.lax.dynamic_slice(values, (row, p, zero, zero), (1, 1, *shape))
            return wave[0] * value[0, 0]

        def add(total, first):
            return sum((term(first + p) for p in range(MODES_AT_ONCE)), total), None

        firsts = jnp.arange(0, whole, MODES_AT_ONCE, dtype=corner.dtype)
        total = jax.lax.scan(add, jnp.zeros(shape, waves.dtype), firsts)[0]
        return sum((term(zero + p) for p in range(whole, modes)), total)

    return jax.lax.map(frame, (corner, entry))


def _apply_reverse(saved, cotangent):
    # Two calls, so that the cotangent that nobody asks for is not computed either.
    choose = partial(jax.lax.platform_dependent, cotangent, *saved)
    to_waves = choose(cpu=add_into_waves, default=lambda *a: _derived(*a)[0])
    to_values = choose(cpu=add_into_values, default=lambda *a: _derived(*a)[1])
    return to_waves, to_values, None, None


def _derived(cotangent, waves, values, corner, entry):
    function = lambda waves, values: frames_together(waves, values, corner, entry)
    return jax.vjp(function, waves, values)[1](cotangent)


def add_into_waves(cotangent, waves, values, corner, entry):
    """Reverse pass of `frame_by_frame` with respect to `waves`."""

    def add(total, frame):
        corner, row, wave = frame
        start = (jnp.zeros((), corner.dtype), corner[0], corner[1])
        patch = window_of(total, corner, values.shape[2:]) + values[row] * wave[None]
        return jax.lax.dynamic_update_slice(total, patch, start), None

    return jax.lax.scan(add, jnp.zeros_like(waves), (corner, entry, cotangent))[0]


def add_into_values(cotangent, waves, values, corner, entry):
    """Reverse pass of `frame_by_frame` with respect to `values`."""

    def add(total, frame):
        corner, row, wave = frame
        return total.at[row].add(window_of(waves, corner, values.shape[2:]) * wave[None]), None

    return jax.lax.scan(add, jnp.zeros_like(values), (corner, entry, cotangent))[0]


apply_beamlets.defvjp(lambda *a: (_apply(*a), a), _apply_reverse)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def apply_ladder(
    waves: Complex[Array, "modes fy fx"],
    values: Complex[Array, "rows modes y x"],
    corner: Int[Array, "frames 2"],
    entry: Int[Array, " frames"],
    rest: Float[Array, "frames 2"],
    strides: tuple[int, int],
    spacing: tuple[float, float],
) -> Complex[Array, "frames y x"]:
    """`apply_beamlets` on a ladder, with a derivative with respect to `rest`.

    The derivative is the difference of the rungs `strides` rows to both sides of `entry`, which
    lie 2 `spacing` (Å) apart.
    """
    return _apply(waves, values, corner, entry)


def _ladder_forward(waves, values, corner, entry, rest, strides, spacing):
    return _apply(waves, values, corner, entry), (waves, values, corner, entry)


def _ladder_reverse(strides, spacing, saved, cotangent):
    to_waves, to_values, _, _ = _apply_reverse(saved, cotangent)
    slope = partial(_slope, strides, spacing)
    return to_waves, to_values, None, None, slope(cotangent, *saved)


def _slope(strides, spacing, cotangent, waves, values, corner, entry):
    """Re sum_m cotangent(m) sum_p sigma_p(corner + m) d beta_p(m)/d rest, along y and x."""
    modes, shape = waves.shape[0], values.shape[2:]
    whole = modes // MODES_AT_ONCE * MODES_AT_ONCE

    def frame(where):
        corner, row, to = where
        zero = jnp.zeros((), corner.dtype)

        def term(p):
            wave = jax.lax.dynamic_slice(waves, (p, corner[0], corner[1]), (1, *shape))[0] * to
            at = lambda r: jax.lax.dynamic_slice(values, (r, p, zero, zero), (1, 1, *shape))[0, 0]
            ends = [(at(row + s), at(row - s)) for s in strides]
            return [wave.real * (a.real - b.real) - wave.imag * (a.imag - b.imag) for a, b in ends]

        def add(totals, first):
            for p in range(MODES_AT_ONCE):
                totals = [a + b for a, b in zip(totals, term(first + p), strict=True)]
            return totals, None

        firsts = jnp.arange(0, whole, MODES_AT_ONCE, dtype=corner.dtype)
        totals, _ = jax.lax.scan(add, [jnp.zeros(shape, waves.real.dtype)] * 2, firsts)
        for p in range(whole, modes):
            totals = [a + b for a, b in zip(totals, term(zero + p), strict=True)]
        return jnp.stack([jnp.sum(t) / (2 * d) for t, d in zip(totals, spacing, strict=True)])

    return jax.lax.map(frame, (corner, entry, cotangent))


apply_ladder.defvjp(_ladder_forward, _ladder_reverse)
