"""Depth from an S-matrix: refocus every incident wave to a plane, and read the wave there.

With both sides referred to the plane z_m, the confocal section at depth z is
C(r; z) = mean_h F^-1{ s_h(q) exp(-i pi lambda (z - z_m)(q² + 2 q.h)) }(r), and its phase is the image:
the wave of a probe focused at (r, z), propagated back to z and read at r. A layer phi at z1 gives
C = 1 + i phi * H with H(q) = exp(i pi lambda dz q²) 2 J1(x)/x, x = 2 pi alpha q dz, dz = z1 - z: no
zeros at focus, no contrast reversal, and a depth width of about 0.7/(alpha q).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from ..physics.detector import Detector
from ..physics.forward import Beamlets, beamlets, Blocks, Scattering
from ..physics.fourier import convolve, fft, ifft, phase_factor
from ..physics.optics import Optics, wavelength
from ..physics.scan import Scan
from ..physics.smatrix import SMatrix, TiltModes


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

    Maximises |sum_h d_h exp(i pi lambda tau h² + 2 pi i a.h)| over tau within ±`search` Å, then refines tau
    and the shift a by Gauss-Newton. `residual` is the rms phase left, rad.
    """
    lam = wavelength(energy)
    tilts = specimen.tilts(math.pi * lam * search * specimen.cutoff**2)
    average = np.asarray(specimen.waves.mean(axis=(1, 2)), complex)
    diagonal = (average @ specimen.basis(tilts)) * np.sqrt(tilts.weights)
    h = tilts.points
    slopes = np.stack([np.pi * lam * np.sum(h**2, 1), *(2 * np.pi * h.T)], axis=1)
    ladder = np.linspace(-search, search, 801)
    overlap = np.abs(np.exp(1j * np.outer(ladder, slopes[:, 0])) @ (diagonal * np.sqrt(tilts.weights)))
    found = np.array([ladder[np.argmax(overlap)], 0.0, 0.0])
    weight = np.abs(diagonal)
    for _ in range(8):
        turned = diagonal * np.exp(1j * slopes @ found)
        left = np.angle(turned * np.conj(np.sum(turned * np.sqrt(tilts.weights))))
        columns = np.concatenate([slopes, np.ones((len(h), 1))], axis=1) * weight[:, None]
        found = found - np.linalg.lstsq(columns, left * weight, rcond=None)[0][:3]
    turned = diagonal * np.exp(1j * slopes @ found)
    left = np.angle(turned * np.conj(np.sum(turned * np.sqrt(tilts.weights))))
    rms = math.sqrt(np.sum(weight**2 * left**2) / np.sum(weight**2))
    return Gauge(float(found[0]), (float(found[1]), float(found[2])), rms)


class Focus(eqx.Module):
    """What all depths share: the spectra of the waves, taken once, and the tilts to sum over."""

    spectra: Complex[Array, "components ky kx"]
    basis: Complex[Array, "components points"]
    points: Float[Array, "points 2"]
    weights: Float[Array, " points"]
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
    basis = specimen.basis(tilts) * np.exp(1j * turn)
    ky, kx = (jnp.asarray(k, real) for k in specimen.grid.frequencies())
    return Focus(
        fft(specimen.waves), jnp.asarray(basis, specimen.waves.dtype), jnp.asarray(h, real),
        jnp.asarray(tilts.weights, real), (ky, kx), lam, specimen.plane, gauge, collector,
    )  # fmt: skip


def confocal(focus: Focus, depth: Float[Array, ""]) -> Complex[Array, "y x"]:
    """C(r; z), normalised to mean 1: the amplitude at r of a probe focused at (r, `depth`).

    The phase factors over (k_x, tilt) are computed once a depth and those over (k_y, tilt) fold
    into the basis, so each row of frequencies costs one product (modes x tilts)(tilts x k_x).
    """
    ky, kx = focus.frequencies
    away = depth - focus.plane - focus.gauge.depth
    turn = -2 * math.pi * focus.wavelength * away
    along_x = phase_factor(turn * kx[0][None, :] * focus.points[:, 1:])
    weights = focus.weights.astype(along_x.dtype)

    def row(k_and_spectrum):
        k, spectrum = k_and_spectrum
        turned = focus.basis * (phase_factor(turn * k * focus.points[:, 0]) * weights)[None]
        columns = along_x
        if focus.collector is not None:
            angle = jnp.hypot(k + focus.points[:, :1], kx[0][None, :] + focus.points[:, 1:])
            columns = jnp.where(angle <= focus.collector * 1e-3 / focus.wavelength, columns, 0)
        return jnp.sum(spectrum * (turned @ columns), axis=0)

    total = jax.lax.map(row, (ky[:, 0], focus.spectra.swapaxes(0, 1)))
    shift_y, shift_x = focus.gauge.shift
    curve = turn / 2 * (ky**2 + kx**2) + 2 * math.pi * (shift_y * ky + shift_x * kx)
    wave = ifft(total * phase_factor(curve))
    return wave / jnp.mean(wave)


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
        spectrum = jnp.tensordot(column, focus.spectra, 1)
        wave = ifft(spectrum * phase_factor(common + turn * (ky * h[0] + kx * h[1])))
        return total + weight * unwrap(wave, focus.frequencies), None

    zero = jnp.zeros(focus.spectra.shape[1:], focus.points.dtype)
    return jax.lax.scan(add, zero, (focus.basis.T, focus.points, focus.weights))[0]


def unwrap(
    wave: Complex[Array, "y x"], frequencies: tuple[Float[Array, "y 1"], Float[Array, "1 x"]]
) -> Float[Array, "y x"]:
    """Phase of `wave` without jumps and of mean 0: the periodic solution of lap(phase) = Im(u* lap u).

    u = wave/|wave|; Laplacians and their inverse are taken in Fourier space.
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

    **Raises:** ValueError for a mode that does not exist.
    """
    blocks = section_blocks(specimen, energy, depths, mode, gauge, collector, len(depths))
    return next(iter(blocks))[1]


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
    reach = float(np.abs(depths - specimen.plane).max())
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
    """
    window = detector.window(optics.wavelength)
    count = [n - m + 1 for n, m in zip(specimen.grid.shape, window.shape, strict=True)]
    origin = [
        o + (m // 2) * d
        for o, m, d in zip(specimen.origin, window.shape, window.sampling, strict=True)
    ]
    positions = np.asarray(origin) + np.stack(
        np.meshgrid(*(np.arange(n) * d for n, d in zip(count, window.sampling, strict=True)), indexing="ij"), -1
    ).reshape(-1, 2)
    real = specimen.waves.real.dtype
    scan = Scan(jnp.asarray(positions, real), jnp.zeros(len(positions), jnp.int32))
    images = _virtual_planes(
        specimen, scan, detector, jnp.asarray(depths, real), mask.astype(real), optics.energy,
        optics.semiangle, (count[0], count[1]),
    )  # fmt: skip
    return VirtualImages(images, (origin[0], origin[1]))


@eqx.filter_jit
def _virtual_planes(specimen, scan, detector, depths, mask, energy, semiangle, shape):
    camera = Detector(detector.shape, detector.pixel, 1)
    numbers = jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)

    def plane(depth):
        lens = Optics(energy, semiangle, {"C10": -depth[None]})
        model = Scattering(lens, specimen, scan, camera, jnp.ones(1, mask.dtype))
        if isinstance(specimen, TiltModes):
            centred = jnp.zeros(1, mask.dtype)
            values = beamlets(lens, specimen, model.window, model.dose, centred, centred)[0, 0]
            plan = Beamlets(values, jnp.zeros(scan.series.shape, jnp.int32))
        else:
            plan = Blocks((0, shape[1] - 1))
        model = eqx.tree_at(lambda m: m.plan, model, plan, is_leaf=lambda x: x is None)
        return jax.lax.map(lambda row: jnp.sum(model(row) * mask[None], axis=(1, 2)), numbers)

    return jax.lax.map(plane, depths)
