"""The forward model: a pytree that turns frame indices into expected electrons.

In tilt modes the exit wave of a frame is sum_p sigma_p(x + m) beta_p(m), with the beamlets
beta_p(m) = sum_h Psi(h) Q_p(h) exp(2 pi i h.(m - rho)) summed on a fine grid of h, so that the
probe is not repeated with the period of the window. In beams it is
sum_h Psi(h) exp(-2 pi i h.rho) exp(2 pi i h.r) s_h(r), a matrix product over beams for a block of
neighbouring positions at once.
"""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .detector import Detector
from .fourier import EXACT, phase_factor
from .grid import Grid
from .optics import aberration_phase, aperture, Optics
from .scan import Scan
from .smatrix import (
    Beams,
    field,
    place,
    SMatrix,
    tilt_polynomials,
    TiltModes,
    unscattered_beams,
    unscattered_modes,
)


MODES_AT_ONCE = 5
"""Modes summed in one loop on CPUs; three to seven are equally fast."""

OVERSAMPLING = 4
"""Period of the beamlets' Fourier sum in windows; what leaks from the next copy is below 1e-3."""


class Beamlets(eqx.Module):
    """Beamlets tabulated over sub-pixel remainders, for frames that share them.

    `values` has one entry for each of the `rows`, by `entry` of each frame. Positions are rounded
    to the tabulated remainders, so that they carry no derivative.
    """

    values: Complex[Array, "rows modes y x"]
    entry: Int[Array, " frames"]


class Blocks(eqx.Module):
    """Frames of one call lie within `reach` (y, x) pixels of each other and share one product.

    Calls whose frames do not are evaluated frame by frame: slower, never wrong.
    """

    reach: tuple[int, int] = eqx.field(static=True)


class Scattering(eqx.Module):
    """Optics, an S-matrix, a scan and a camera: `model(index)` gives the expected frames.

    `dose` is the mean number of electrons per frame of each scan. Without a `plan` every frame is
    evaluated on its own, differentiably in all leaves; `prepare` makes the plan for speed.
    """

    optics: Optics
    specimen: SMatrix
    scan: Scan
    detector: Detector
    dose: Float[Array, " scans"]
    plan: Beamlets | Blocks | None = None

    def __call__(self, index: Int[Array, " frames"]) -> Float[Array, "frames ky kx"]:
        return self.detector(exit_waves(self, index))

    @property
    def window(self) -> Grid:
        """The window seen by one probe."""
        return self.detector.window(self.optics.wavelength)


def unscattered(
    optics: Optics,
    detector: Detector,
    scan: Scan,
    dose: Float[Array, " scans"],
    plane: float,
    order: int | None = 8,
) -> Scattering:
    """The model of an empty specimen on the field that the scan's windows cover: where to start.

    `plane` (Å) is the depth to which both sides of S are referred, best the middle of the
    specimen. `order` of the tilt polynomials; None for beams.
    """
    window = detector.window(optics.wavelength)
    grid, origin = field(np.asarray(scan.positions, float), window)
    if order is None:
        specimen: SMatrix = unscattered_beams(grid, window, origin, plane, optics.cutoff)
    else:
        specimen = unscattered_modes(grid, origin, plane, optics.cutoff, order)
    return Scattering(optics, specimen, scan, detector, dose)


def exit_waves(model: Scattering, index: Int[Array, " frames"]) -> Complex[Array, "frames y x"]:
    """The wave behind the specimen, in the window of each frame, referred to the mid-plane."""
    corner, rest = place(model.specimen, model.scan.positions[index], model.window)
    if isinstance(model.specimen, Beams):
        return _beam_waves(model, model.specimen, model.scan.series[index], corner, rest)
    if isinstance(model.plan, Beamlets):
        values, entry = model.plan.values, model.plan.entry[index]
    else:
        values = jax.vmap(lambda scan, offset: _beamlets_at(model, scan, offset))(
            model.scan.series[index], rest
        )
        entry = jnp.arange(index.shape[0], dtype=jnp.int32)
    return apply_beamlets(model.specimen.waves, values, corner, entry)


def _beamlets_at(model, scan, offset):
    optics = jax.tree.map(lambda a: a[scan][None], model.optics)
    values = beamlets(
        optics, model.specimen, model.window, model.dose[scan][None], offset[:1], offset[1:]
    )
    return values[0, 0, 0]


def beamlets(
    optics: Optics,
    specimen: TiltModes,
    window: Grid,
    dose: Float[Array, " scans"],
    rest_y: Float[Array, " ty"],
    rest_x: Float[Array, " tx"],
) -> Complex[Array, "scans ty tx modes y x"]:
    """beta_p(m) of each scan for probes `rest_y`, `rest_x` Å off the window's centre pixel.

    The probe is referred to the specimen's plane: exp(-i chi) exp(-i pi lambda plane h²). The sums
    over h factor into one matrix product along y and one along x.
    """
    fine, spectrum = _illumination(optics, specimen, window)
    spectrum = spectrum * jnp.sqrt(dose)[:, None, None, None].astype(spectrum.dtype)
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
    rows = jnp.einsum("tmh,dphk->dtpmk", ramps[0], spectrum, precision=EXACT)
    return jnp.einsum("dtpmk,unk->dtupmn", rows, ramps[1], precision=EXACT)


def _illumination(optics: Optics, specimen: TiltModes, window: Grid):
    """Fine frequencies inside the aperture and Psi_d(h) Q_p(h) there, for one electron."""
    dtype = jax.tree.leaves(optics.aberrations)[0].dtype
    fine = []
    for length in window.extent:
        step = 1 / (OVERSAMPLING * length)
        count = math.floor(optics.cutoff / step) + 1
        fine.append(step * np.arange(-count, count + 1))
    ky, kx = fine[0][:, None], fine[1][None, :]
    amplitude = aperture(ky, kx, optics.cutoff)
    samples = OVERSAMPLING**2 * window.shape[0] * window.shape[1]
    amplitude /= np.linalg.norm(amplitude) * math.sqrt(samples)
    ky, kx = np.broadcast_arrays(ky, kx)
    modes = tilt_polynomials(specimen.order, np.stack([ky, kx], -1), optics.cutoff)
    travel = math.pi * optics.wavelength * specimen.plane * (ky**2 + kx**2)
    chi = aberration_phase(
        optics.aberrations, jnp.asarray(ky, dtype), jnp.asarray(kx, dtype), optics.energy
    )
    wave = phase_factor(-chi - jnp.asarray(travel, dtype)[None])
    return fine, wave[:, None] * jnp.asarray(amplitude * modes, wave.dtype)[None]


def prepare(
    model: Scattering, per_pixel: int = 8, chunk: Int[np.ndarray, "chunks frames"] | None = None
) -> Scattering:
    """The model with the plan that makes it fast while optics and positions stand still.

    In tilt modes the beamlets are tabulated over the sub-pixel remainders of the positions: exact
    where an axis has at most `per_pixel` distinct ones (a raster commensurate with the pixels),
    otherwise positions are rounded to 1/`per_pixel` of a pixel. In beams the reach of the frames
    of each row of `chunk` is noted.
    """
    corner, rest = place(model.specimen, model.scan.positions, model.window)
    if isinstance(model.specimen, Beams):
        corner, chunk = np.asarray(corner), np.zeros((1, 1), int) if chunk is None else chunk
        reach = np.ptp(corner[chunk], axis=1).max(axis=0)
        plan = Blocks((int(reach[0]), int(reach[1])))
    else:
        plan = _tabulate(model, np.asarray(rest, float), per_pixel)
    return eqx.tree_at(lambda m: m.plan, model, plan, is_leaf=lambda x: x is None)


def _tabulate(model, rest, per_pixel: int) -> Beamlets:
    levels, entry = [], np.asarray(model.scan.series, np.int64)
    for axis, step in enumerate(model.window.sampling):
        values, index = _levels(rest[:, axis], step, per_pixel)
        levels.append(jnp.asarray(values, model.scan.positions.dtype))
        entry = entry * len(values) + index
    values = beamlets(model.optics, model.specimen, model.window, model.dose, *levels)
    return Beamlets(values.reshape(-1, *values.shape[3:]), jnp.asarray(entry, jnp.int32))


def _levels(rest, step: float, per_pixel: int):
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


def _window_of(waves, corner, shape):
    start = (jnp.zeros((), corner.dtype), corner[0], corner[1])
    return jax.lax.dynamic_slice(waves, start, (waves.shape[0], *shape))


def frames_together(waves, values, corner, entry):
    """`apply_beamlets` as one sum over the windows of all frames, derivable."""
    windows = jax.vmap(lambda c: _window_of(waves, c, values.shape[2:]))(corner)
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
        patch = _window_of(total, corner, values.shape[2:]) + values[row] * wave[None]
        return jax.lax.dynamic_update_slice(total, patch, start), None

    return jax.lax.scan(add, jnp.zeros_like(waves), (corner, entry, cotangent))[0]


def add_into_values(cotangent, waves, values, corner, entry):
    """Reverse pass of `frame_by_frame` with respect to `values`."""

    def add(total, frame):
        corner, row, wave = frame
        return total.at[row].add(_window_of(waves, corner, values.shape[2:]) * wave[None]), None

    return jax.lax.scan(add, jnp.zeros_like(values), (corner, entry, cotangent))[0]


apply_beamlets.defvjp(lambda *a: (_apply(*a), a), _apply_reverse)


def _beam_waves(model: Scattering, specimen: Beams, series, corner, rest):
    weights = _beam_weights(model, specimen)[series]
    step = jnp.asarray(model.window.sampling, rest.dtype)
    if isinstance(model.plan, Blocks) and corner.shape[0] > 1:
        low = corner.min(axis=0)
        near = jnp.all(corner.max(axis=0) - low <= jnp.asarray(model.plan.reach, jnp.int32))
        arguments = (specimen, weights, corner, rest)
        return jax.lax.cond(
            near, partial(_together, model.plan.reach, step), partial(_apart, step), *arguments
        )
    return _apart(step, specimen, weights, corner, rest)


def _beam_weights(model: Scattering, specimen: Beams) -> Complex[Array, "scans beams"]:
    """Psi_d(h) referred to the specimen's plane, such that the window holds `dose` electrons."""
    h = specimen.points
    ky, kx = (jnp.asarray(h[:, i], model.dose.dtype) for i in (0, 1))
    travel = math.pi * model.optics.wavelength * specimen.plane * np.sum(h**2, axis=1)
    chi = aberration_phase(model.optics.aberrations, ky, kx, model.optics.energy)
    pixels = model.window.shape[0] * model.window.shape[1]
    size = jnp.sqrt(model.dose / (len(h) * pixels))
    wave = phase_factor(-chi - jnp.asarray(travel, chi.dtype)[None])
    return wave * size[:, None].astype(wave.dtype)


def _tilted(specimen: Beams, corner, shape):
    """exp(2 pi i h.j) s_h(corner + j): the beams' waves, tilt included, in a window."""
    real = specimen.waves.real.dtype
    ramps = []
    for axis, (count, step) in enumerate(zip(shape, specimen.grid.sampling, strict=True)):
        turns = np.outer(specimen.points[:, axis], step * np.arange(count)) % 1.0
        ramps.append(phase_factor(jnp.asarray(2 * np.pi * turns, real)))
    tilt = ramps[0][:, :, None] * ramps[1][:, None, :]
    return _window_of(specimen.waves, corner, shape) * tilt


def _ramp(specimen: Beams, from_corner):
    """exp(-2 pi i h.rho) for rho in Å from the corner of the window."""
    h = jnp.asarray(specimen.points, from_corner.dtype)
    turns = jnp.einsum("...a,ba->...b", from_corner, h, precision=EXACT)
    return phase_factor(-2 * math.pi * (turns - jnp.round(jax.lax.stop_gradient(turns))))


def _centre(specimen: Beams, step):
    half = jnp.asarray([n // 2 for n in specimen.window.shape], step.dtype)
    return half * step


def _together(reach, step, specimen: Beams, weights, corner, rest):
    """One product (frames x beams)(beams x pixels) over the union of the windows, then crops."""
    shape = tuple(n + r for n, r in zip(specimen.window.shape, reach, strict=True))
    limit = jnp.asarray([n - s for n, s in zip(specimen.grid.shape, shape, strict=True)], jnp.int32)
    low = jnp.minimum(corner.min(axis=0), jnp.maximum(limit, 0))
    inner = corner - low[None]
    centre = inner.astype(rest.dtype) * step[None] + rest + _centre(specimen, step)[None]
    waves = _tilted(specimen, low, shape)
    product = _product(weights * _ramp(specimen, centre), waves.reshape(waves.shape[0], -1))
    crop = lambda wave, at: jax.lax.dynamic_slice(wave, (at[0], at[1]), specimen.window.shape)
    return jax.vmap(crop)(product.reshape(-1, *shape), inner)


def _product(left, right):
    """left @ right by three real products instead of four (Gauss), faster than XLA's own."""
    a, b, c, d = left.real, left.imag, right.real, right.imag
    multiply = partial(jnp.matmul, precision=EXACT)
    common = multiply(a + b, c)
    return jax.lax.complex(common - multiply(b, c + d), common + multiply(a, d - c))


def _apart(step, specimen: Beams, weights, corner, rest):
    """The slow exact path: every frame sums its own beams."""
    weights = weights * _ramp(specimen, rest + _centre(specimen, step)[None])

    def frame(weights_corner):
        waves = _tilted(specimen, weights_corner[1], specimen.window.shape)
        return jnp.tensordot(weights_corner[0], waves, 1, precision=EXACT)

    return jax.lax.map(frame, (weights, corner))
