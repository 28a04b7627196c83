"""Depth from an S-matrix: refocus every incident wave to a plane, and read the wave there.

With both sides referred to the plane z_m, the confocal section at depth z is
C(r; z) = mean_h F^-1{ s_h(q) exp(-i pi lambda (z - z_m)(q² + 2 q.h)) }(r), and its phase is the
image: the wave of a probe focused at (r, z), propagated back to z and read at r. A layer phi at z1
gives C = 1 + i phi * H with H(q) = exp(i pi lambda dz q²) 2 J1(x)/x, x = 2 pi alpha q dz,
dz = z1 - z: no zeros at focus, no contrast reversal, and a depth width of about 0.7/(alpha q).
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from ..physics.beamlets import Beamlets, tabulated
from ..physics.detector import Detector
from ..physics.forward import Blocks, Scattering
from ..physics.fourier import convolve, EXACT, fft, ifft, phase_factor
from ..physics.grid import Grid
from ..physics.optics import Optics, wavelength
from ..physics.scan import Scan
from ..physics.smatrix import Beams, SMatrix, TiltModes
from .priors import mode_orders, ridge_quadrature, ridge_shares


_product = partial(jnp.matmul, precision=EXACT)


class Gauge(NamedTuple):
    """The output plane that the data do not fix: depth (Å beyond the reference plane), shift (Å).

    The waves hold exp(-i pi lambda depth k²) exp(-2 pi i shift.k) too much on the output side,
    k = q + h; sections take it out.
    """

    depth: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    residual: float = 0.0


def diagonal_gauge(specimen: SMatrix, energy: float, search: float = 200.0) -> Gauge:
    """The gauge that makes the unscattered waves s_h(q = 0) agree in phase over the aperture.

    Maximises |sum_h d_h exp(i pi lambda tau h² + 2 pi i a.h)| over tau within ±`search` Å, then
    refines tau and the shift a by Gauss-Newton. `residual` is the rms phase left, rad. Shifts above
    about 0.4 lambda/alpha are not found: the residual is then above 1 rad and the rest is wrong.
    """
    lam = wavelength(energy)
    tilts = specimen.tilts(math.pi * lam * search * specimen.cutoff**2)
    average = np.asarray(specimen.waves.mean(axis=(1, 2)), complex)
    h, weights = tilts.points, tilts.weights
    diagonal = average @ specimen.basis(tilts)
    slopes = np.stack([np.pi * lam * np.sum(h**2, 1), *(2 * np.pi * h.T)], axis=1)
    ladder = np.linspace(-search, search, 801)
    overlap = np.abs(np.exp(1j * np.outer(ladder, slopes[:, 0])) @ (diagonal * weights))
    found = np.array([ladder[np.argmax(overlap)], 0.0, 0.0])
    strength = np.sqrt(weights) * np.abs(diagonal)
    columns = np.concatenate([slopes, np.ones((len(h), 1))], axis=1) * strength[:, None]
    for _ in range(8):
        left = _phase_left(diagonal, weights, slopes @ found)
        found = found - np.linalg.lstsq(columns, left * strength, rcond=None)[0][:3]
    left = _phase_left(diagonal, weights, slopes @ found)
    rms = math.sqrt(np.sum(strength**2 * left**2) / np.sum(strength**2))
    return Gauge(float(found[0]), (float(found[1]), float(found[2])), rms)


def _phase_left(diagonal, weights, turn):
    """Phase of each unscattered wave turned by `turn` against that of their mean."""
    turned = diagonal * np.exp(1j * turn)
    return np.angle(turned * np.conj(np.sum(turned * weights)))


class Ridges(eqx.Module):
    """Tilt modes summed along each transfer q, for which a sum over tilts has one dimension.

    The mean over tilts of Q_p(h) exp(i x h.q/|q|) is a ridge amplitude times a share that does not
    depend on depth (see `priors`); `spectra` are the sums of the modes with their shares. `nodes`
    are in 1/Å.
    """

    spectra: Complex[Array, "ridges ky kx"]
    nodes: Float[Array, " nodes"]
    weights: Float[Array, "2 ridges nodes"]


class Focus(eqx.Module):
    """What all depths share: the spectra of the waves, taken once, and the tilts to sum over.

    `basis` gives the wave of each tilt from the components; beams are those waves already, and
    have a factor each. `ridges` replace the sum over tilts where nothing else depends on the tilt.
    """

    spectra: Complex[Array, "components ky kx"]
    basis: Complex[Array, "components points"] | Complex[Array, " components"]
    points: Float[Array, "points 2"]
    weights: Float[Array, " points"]
    ridges: Ridges | None
    frequencies: tuple[Float[Array, "ky 1"], Float[Array, "1 kx"]]
    wavelength: float = eqx.field(static=True)
    plane: float = eqx.field(static=True)
    gauge: Gauge = eqx.field(static=True)
    collector: float | None = eqx.field(static=True)


def focus(
    specimen: SMatrix,
    energy: float,
    reach: float,
    gauge: Gauge | None = None,
    collector: float | None = None,
) -> Focus:
    """Prepare sections at most `reach` Å from the specimen's plane.

    `collector` (mrad) keeps only outgoing waves within that angle.
    """
    lam, real = wavelength(energy), specimen.waves.real.dtype
    gauge = gauge or Gauge()
    q = math.hypot(*(0.5 / d for d in specimen.grid.sampling))
    tilts = specimen.tilts(2 * math.pi * lam * (reach + abs(gauge.depth)) * q * specimen.cutoff)
    h = tilts.points
    turn = np.pi * lam * gauge.depth * np.sum(h**2, 1) + 2 * np.pi * h @ np.asarray(gauge.shift)
    basis = 1.0 if isinstance(specimen, Beams) else specimen.basis(tilts)
    basis, spectra = basis * np.exp(1j * turn), fft(specimen.waves)
    plain = collector is None and np.abs(turn).max() < 1e-5
    ridges = None
    if plain and isinstance(specimen, TiltModes):
        ridges = _ridges(specimen, spectra, 2 * math.pi * lam * reach * q * specimen.cutoff)
    ky, kx = (jnp.asarray(k, real) for k in specimen.grid.frequencies())
    return Focus(
        spectra, jnp.asarray(basis, spectra.dtype), jnp.asarray(h, real),
        jnp.asarray(tilts.weights, real), ridges, (ky, kx), lam, specimen.plane, gauge, collector,
    )  # fmt: skip


def _ridges(specimen: TiltModes, spectra, phase: float) -> Ridges:
    ky, kx = np.broadcast_arrays(*specimen.grid.frequencies())
    turn = jnp.asarray(np.exp(1j * np.arctan2(ky, kx)), spectra.dtype)
    nodes, weights = ridge_quadrature(specimen.order, phase)
    real = specimen.waves.real.dtype
    return Ridges(
        _sum_of_shares(specimen.order, spectra, turn),
        jnp.asarray(specimen.cutoff * nodes, real),
        jnp.asarray(weights, real),
    )


@eqx.filter_jit
def _sum_of_shares(order: int, spectra, turn):
    ridge = np.asarray([n for n, _, _ in mode_orders(order)])
    return jax.ops.segment_sum(ridge_shares(order, turn) * spectra, ridge, order + 1)


def confocal(focus: Focus, depth: Float[Array, ""]) -> Complex[Array, "y x"]:
    """C(r; z), normalised to mean 1: the amplitude at r of a probe focused at (r, `depth`)."""
    ky, kx = focus.frequencies
    turn = -2 * math.pi * focus.wavelength * (depth - focus.plane - focus.gauge.depth)
    total = _over_tilts(focus, turn) if focus.ridges is None else _over_ridges(focus, turn)
    shift_y, shift_x = focus.gauge.shift
    curve = turn / 2 * (ky**2 + kx**2) + 2 * math.pi * (shift_y * ky + shift_x * kx)
    wave = ifft(total * phase_factor(curve))
    return wave / jnp.mean(wave)


def _over_tilts(focus: Focus, turn: Float[Array, ""]) -> Complex[Array, "ky kx"]:
    """Mean over tilts of s_h(q) exp(i turn q.h).

    The phase factors over (k_x, tilt) are computed once and those over (k_y, tilt) fold into the
    basis, so each row of frequencies costs one product (modes x tilts)(tilts x k_x).
    """
    ky, kx = focus.frequencies
    along_x = phase_factor(turn * kx[0][None, :] * focus.points[:, 1:])
    weights = focus.weights.astype(along_x.dtype)

    def row(k_and_spectrum):
        k, spectrum = k_and_spectrum
        along_y = phase_factor(turn * k * focus.points[:, 0]) * weights
        columns = along_x
        if focus.collector is not None:
            angle = jnp.hypot(k + focus.points[:, :1], kx[0][None, :] + focus.points[:, 1:])
            columns = jnp.where(angle <= focus.collector * 1e-3 / focus.wavelength, columns, 0)
        if focus.basis.ndim == 1:
            return jnp.sum(spectrum * (focus.basis * along_y)[:, None] * columns, axis=0)
        return jnp.sum(spectrum * _product(focus.basis * along_y[None], columns), axis=0)

    return jax.lax.map(row, (ky[:, 0], focus.spectra.swapaxes(0, 1)))


def _over_ridges(focus: Focus, turn: Float[Array, ""]) -> Complex[Array, "ky kx"]:
    """The same mean, along q: some tens of nodes take the place of a thousand tilts."""
    ridges = focus.ridges
    assert ridges is not None  # by `confocal`

    def row(radius_and_spectrum):
        radius, spectrum = radius_and_spectrum
        phase = turn * ridges.nodes[:, None] * radius[None]
        amplitudes = _product(ridges.weights[0], jnp.cos(phase))
        amplitudes = amplitudes + _product(ridges.weights[1], jnp.sin(phase))
        return jnp.sum(spectrum * amplitudes.astype(spectrum.dtype), axis=0)

    ky, kx = focus.frequencies
    return jax.lax.map(row, (jnp.hypot(ky, kx), ridges.spectra.swapaxes(0, 1)))


def confocal_phase(focus: Focus, depth: Float[Array, ""]) -> Float[Array, "y x"]:
    """Phase of the confocal section, rad."""
    return jnp.angle(confocal(focus, depth))


def confocal_intensity(focus: Focus, depth: Float[Array, ""]) -> Float[Array, "y x"]:
    """|C|²: what scanning confocal microscopy (SCEM) would record; weak for phase objects."""
    wave = confocal(focus, depth)
    return wave.real**2 + wave.imag**2


def tilt_mean(focus: Focus, depth: Float[Array, ""]) -> Float[Array, "y x"]:
    """Mean over tilts of the unwrapped phase of each refocused wave, rad.

    Transfers like the confocal phase for weak specimens; strong ones interfere less.
    """
    ky, kx = focus.frequencies
    turn = -2 * math.pi * focus.wavelength * (depth - focus.plane - focus.gauge.depth)
    shift_y, shift_x = focus.gauge.shift
    common = turn / 2 * (ky**2 + kx**2) + 2 * math.pi * (shift_y * ky + shift_x * kx)

    def add(total, tilt):
        column, h, weight = tilt
        factor = phase_factor(common + turn * (ky * h[0] + kx * h[1]))
        return total + weight * unwrap(ifft(_spectrum(focus, column) * factor), (ky, kx)), None

    zero = jnp.zeros(focus.spectra.shape[1:], focus.points.dtype)
    columns = jnp.arange(len(focus.basis)) if focus.basis.ndim == 1 else focus.basis.T
    return jax.lax.scan(add, zero, (columns, focus.points, focus.weights))[0]


def _spectrum(focus: Focus, column) -> Complex[Array, "ky kx"]:
    """Spectrum of one tilt's wave: of the beam numbered `column`, or of modes with these shares."""
    if column.ndim == 0:
        return focus.basis[column] * focus.spectra[column]
    return jnp.tensordot(column, focus.spectra, 1, precision=EXACT)


def unwrap(
    wave: Complex[Array, "y x"], frequencies: tuple[Float[Array, "y 1"], Float[Array, "1 x"]]
) -> Float[Array, "y x"]:
    """Phase of `wave` without jumps and of mean 0.

    The periodic solution of lap(phase) = Im(u* lap u), u = wave/|wave|; Laplacians and their
    inverse are taken in Fourier space. `frequencies` are those of `Grid.frequencies`.
    """
    unit = wave / jnp.maximum(jnp.abs(wave), 1e-12).astype(wave.dtype)
    square = frequencies[0] ** 2 + frequencies[1] ** 2
    inverse = jnp.where(square > 0, 1 / jnp.where(square > 0, square, 1.0), 0.0)
    curl = jnp.imag(jnp.conj(unit) * convolve(unit, square.astype(wave.dtype)))
    return jnp.real(convolve(curl.astype(wave.dtype), inverse.astype(wave.dtype)))


SECTIONS: dict[str, Callable[[Focus, Float[Array, ""]], Float[Array, "y x"]]] = {
    "confocal": confocal_phase,
    "tilt_mean": tilt_mean,
    "scem": confocal_intensity,
}


@eqx.filter_jit
def _planes(focus: Focus, depths, section):
    return jax.lax.map(lambda depth: section(focus, depth), depths)


def depth_sections(
    specimen: SMatrix,
    energy: float,
    depths: Float[Array, " z"] | Float[np.ndarray, " z"],
    mode: str = "confocal",
    gauge: Gauge | None = None,
    collector: float | None = None,
) -> Float[Array, "z y x"]:
    """Images of the specimen focused at `depths` (Å), on the specimen's grid.

    `mode`: "confocal" (phase, rad), "tilt_mean" (phase, rad) or "scem" (intensity, 1 in vacuum).

    **Raises:** ValueError for a mode that does not exist or no depths.
    """
    count = len(depths)
    if count == 0:
        raise ValueError("`depth_sections`: `depths` is empty; give at least one depth in Å.")
    return next(section_blocks(specimen, energy, depths, mode, gauge, collector, count))[1]


def section_blocks(
    specimen: SMatrix,
    energy: float,
    depths: Float[Array, " z"] | Float[np.ndarray, " z"],
    mode: str = "confocal",
    gauge: Gauge | None = None,
    collector: float | None = None,
    block: int = 16,
) -> Iterator[tuple[Float[np.ndarray, " block"], Float[Array, "block y x"]]]:
    """`depth_sections` in blocks of planes, for volumes that are written as they come."""
    if mode not in SECTIONS:
        raise ValueError(f"`mode` {mode!r} is not a depth section; known: {sorted(SECTIONS)}.")
    depths = np.asarray(depths, float)
    reach = float(np.abs(depths - specimen.plane).max(initial=0.0))
    prepared = focus(specimen, energy, reach, gauge, collector)
    for first in range(0, len(depths), block):
        part = depths[first : first + block]
        yield part, _planes(prepared, jnp.asarray(part, prepared.points.dtype), SECTIONS[mode])


class VirtualImages(NamedTuple):
    """Images (z, y, x) and the place (y, x) Å of their pixel (0, 0) in the scan's frame."""

    images: Float[Array, "z y x"]
    origin: tuple[float, float]


def virtual_images(
    specimen: SMatrix,
    optics: Optics,
    detector: Detector,
    depths: Float[Array, " z"] | Float[np.ndarray, " z"],
    mask: Float[Array, "ky kx"],
) -> VirtualImages:
    """What a STEM detector of weights `mask` records when a perfect probe is focused at `depths`.

    I(r; z) = sum_k mask(k) |F{exit wave of a probe at (r, z)}|² in fractions of the beam, at every
    pixel whose window lies inside the field. The zero frequency of `mask` is in the corner. The
    output gauge of S drops out; each depth costs one forward pass.

    **Raises:** ValueError if window, specimen and mask do not fit each other.
    """
    window = detector.window(optics.wavelength)
    _require_fit(specimen, window, mask)
    count = [n - m + 1 for n, m in zip(specimen.grid.shape, window.shape, strict=True)]
    axes = [
        o + (m // 2 + np.arange(n)) * d
        for o, m, n, d in zip(specimen.origin, window.shape, count, window.sampling, strict=True)
    ]
    positions = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    real = specimen.waves.real.dtype
    scan = Scan(jnp.asarray(positions, real), jnp.zeros(len(positions), jnp.int32))
    images = _virtual_planes(
        specimen, scan, detector, jnp.asarray(depths, real), mask.astype(real), optics.energy,
        optics.semiangle, (count[0], count[1]),
    )  # fmt: skip
    return VirtualImages(images, (float(axes[0][0]), float(axes[1][0])))


def _require_fit(specimen: SMatrix, window: Grid, mask) -> None:
    same = np.allclose(window.sampling, specimen.grid.sampling, rtol=1e-6)
    fits = all(m <= n for m, n in zip(window.shape, specimen.grid.shape, strict=True))
    if not (same and fits and mask.shape == window.shape):
        raise ValueError(
            f"`virtual_images`: the detector sees windows of {window.shape} pixels of "
            f"{window.sampling} Å, the specimen has {specimen.grid.shape} pixels of "
            f"{specimen.grid.sampling} Å and `mask` {mask.shape}; windows must be sampled as the "
            "specimen is and fit into it, and `mask` needs one weight a pixel of the detector."
        )


@eqx.filter_jit
def _virtual_planes(specimen, scan, detector, depths, mask, energy, semiangle, shape):
    camera = Detector(detector.shape, detector.pixel, 1)
    numbers = jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)

    def plane(depth):
        lens = Optics(energy, semiangle, {"C10": -depth[None]})
        model = Scattering(lens, specimen, scan, camera, jnp.ones(1, mask.dtype))
        if isinstance(specimen, TiltModes):
            centred = jnp.zeros(1, mask.dtype)
            table = tabulated(lens, specimen, model.window, None, model.dose, centred, centred)
            plan = Beamlets(table, jnp.zeros(scan.series.shape, jnp.int32))
        else:
            plan = Blocks((0, shape[1] - 1))
        model = eqx.tree_at(lambda m: m.plan, model, plan, is_leaf=lambda x: x is None)
        return jax.lax.map(lambda row: jnp.sum(model(row) * mask[None], axis=(1, 2)), numbers)

    return jax.lax.map(plane, depths)
