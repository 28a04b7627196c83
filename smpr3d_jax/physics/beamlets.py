"""Tables of beamlets, the probe's part in the exit waves of tilt modes.

The exit wave of a frame is sum_p sigma_p(x + m) beta_p(m), with the beamlets
beta_p(m) = sum_h Psi(h) Q_p(h) exp(2 pi i h.(m - rho)) summed on a fine grid of h, so that the
probe is not repeated with the period of the window. Each incoherent state of the probe has its own
beamlets; in a table they follow each other.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .fourier import phase_factor, product
from .grid import Grid
from .optics import aperture, Optics, pupil
from .smatrix import TiltModes
from .windows import exit_sum, Layout
from .zernike import tilt_polynomials


OVERSAMPLING = 4
"""Period of the beamlets' Fourier sum in windows; what leaks from the next copy is below 1e-3."""

STRETCH = 1.05
"""A camera length may be wrong by so much: the fine grid of h reaches that far."""


class Table(eqx.Module):
    """Beamlets in the window, and those of the first mode alone in a wider one around it.

    `halo` (None: nothing) has the window of the camera's finer pattern. What scatters around the
    inner window is little, but the probe's own tails must not end there: cut off, they would pull
    a refined defocus towards focus. Both have `margin` pixels more on each side.
    """

    values: Complex[Array, "rows modes y x"]
    halo: Complex[Array, "rows 1 Y X"] | None
    margin: int = eqx.field(static=True, default=0)

    @property
    def shape(self) -> tuple[int, int]:
        """The window's pixels."""
        y, x = (n - 2 * self.margin for n in self.values.shape[2:])
        return y, x


class Beamlets(eqx.Module):
    """Beamlets tabulated over sub-pixel remainders, for frames that share them.

    `entry` is the row of each frame's first state in `table`. Positions are rounded to the
    tabulated remainders, so that they carry no derivative.
    """

    table: Table
    entry: Int[Array, " frames"]


class Ladder(eqx.Module):
    """Beamlets of every scan on a ladder of sub-pixel remainders, for positions that move.

    A pixel has `per_pixel` rungs along each axis. The value is that of the nearest rung, and
    differences of its neighbours give the derivative with respect to the position: those beyond
    the pixel are the same beamlets, a pixel further, for which the table has a margin of one. Rows
    are ordered by y, x, scan and state.
    """

    table: Table
    per_pixel: int = eqx.field(static=True)
    states: int = eqx.field(static=True)

    def layout(self, window: Grid) -> Layout:
        """How its rows follow each other."""
        group = self.table.values.shape[0] // self.per_pixel**2
        y, x = (step / self.per_pixel for step in window.sampling)
        return Layout(window.shape, self.table.margin, self.per_pixel, group, (y, x))

    def rows(
        self, series: Int[Array, " frames"], rest: Float[Array, "frames 2"], window: Grid
    ) -> Int[Array, " frames"]:
        """The row of the first state of each frame, `rest` (Å) off the centre of its pixel."""
        step, n = jnp.asarray(window.sampling, rest.dtype), self.per_pixel
        rung = jnp.floor((rest / step[None] + 0.5) * n).astype(jnp.int32)
        rung = jnp.clip(rung, 0, n - 1)
        return (rung[:, 0] * n + rung[:, 1]) * self.layout(window).group + series * self.states


def rungs(window: Grid, per_pixel: int) -> list[Float[np.ndarray, " rungs"]]:
    """Remainders (Å) along y and x that a `Ladder` tabulates."""
    fraction = (np.arange(per_pixel) + 0.5) / per_pixel - 0.5
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
    return jnp.moveaxis(_synthesised(fine, spectrum, window, rest_y, rest_x), 2, 0)


def tabulated(
    optics: Optics,
    specimen: TiltModes,
    window: Grid,
    halo: Grid | None,
    dose: Float[Array, " scans"],
    rest_y: Float[Array, " ty"],
    rest_x: Float[Array, " tx"],
    stretch: Float[Array, ""] | None = None,
    margin: int = 0,
) -> Table:
    """`beamlets` in rows by y, x, scan and state, and those of the first mode in `halo`."""
    fine, spectrum = _illumination(optics, specimen, window, dose, stretch)

    def rows(spectrum, window):
        shape = (window.shape[0] + 2 * margin, window.shape[1] + 2 * margin)
        large = Grid(shape, window.sampling)
        values = _synthesised(fine, spectrum, large, rest_y, rest_x)
        return values.reshape(-1, *values.shape[4:])

    values = rows(spectrum, window)
    return Table(values, None if halo is None else rows(spectrum[:, :, :1], halo), margin)


def _synthesised(fine, spectrum, window: Grid, rest_y, rest_x):
    """The sums over h in `window` for probes beside its centre, by y, x, scan, state and mode.

    A product a rung writes the table as it will be read.
    """
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
    waves, (ky, kx), (m, n) = spectrum.shape[:3], spectrum.shape[3:], window.shape
    side = jnp.moveaxis(spectrum, 3, 0).reshape(ky, -1)

    def rung_y(ramp):
        rows = product(ramp, side).reshape(m, -1, kx).swapaxes(0, 1).reshape(-1, kx)
        rung_x = lambda ramp: product(rows, ramp.T).reshape(*waves, m, n)
        return jax.lax.map(rung_x, ramps[1])

    return jax.lax.map(rung_y, ramps[0])


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
    table = tabulated(optics, specimen, window, halo, dose, y, x, stretch, margin=1)
    return Ladder(table, per_pixel, optics.states)


def summed(
    waves: Complex[Array, "modes fy fx"],
    table: Table,
    corner: Int[Array, "frames 2"],
    entry: Int[Array, " frames"],
    rest: Float[Array, "frames 2"] | None = None,
    layout: Layout | None = None,
) -> Complex[Array, "frames Y X"]:
    """The exit waves of frames from a table, in the halo's window where there is one.

    A ladder's `layout` makes `rest` (Å) carry the derivative.
    """
    layout = layout or Layout(table.shape, table.margin)
    return exit_sum(layout, waves, table.values, table.halo, corner, entry, rest)


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
