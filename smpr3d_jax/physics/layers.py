"""The specimen as layers that can be fitted: multislice of each frame's probe in its own window.

A few thin layers turn the phase of the wave by sigma V; between them it crosses free space. The
probe of a frame is made at the first layer as it is in infinite space, and cropped to the window;
from there on the window is periodic: what walks out on one side comes in on the other. So the
window must hold the probe at every layer and at `plane`, where the exit wave is handed over:
extent >= 2 alpha |depth - defocus| + 3 lambda/alpha, as for the S-matrix.

`correction` multiplies what the layers make of each tilt, S = multislice (1 + sum_p c_p(r) Q_p(h)),
with the tilt polynomials of `smatrix`; it costs one multislice for each of its modes.

What the data cannot tell: all depths moved with all defoci; and, as the layers are thin, a tilt
from layers shifted sideways by -tan(tilt) times their depths.
"""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .beamlets import beamlets, window_of
from .fourier import convolve, EXACT, fft, ifft, phase_factor
from .grid import Grid
from .optics import Optics, wavelength
from .propagation import fresnel, transmission
from .smatrix import Beams, disc_quadrature, SMatrix, smooth, TiltModes, window_beams
from .zernike import mode_count, tilt_polynomials


GUARD = 4
"""Pixels beyond each side of the window in which the probe fades, so that it can be shifted."""


class Layers(eqx.Module):
    """Projected potential (V Å) of thin layers at `depths` (Å), in ascending order.

    `tilt` (y, x) in mrad is the specimen's, which turns about `plane` (see `fresnel`). `correction`
    are the coefficients c_p of tilt polynomials up to some radial order (None: none). `grid` is the
    field's, `origin` (y, x) Å the place of pixel (0, 0) in the scan's frame, `plane` Å the depth
    to which exit waves are referred, `cutoff` the aperture's radius in 1/Å.
    """

    potential: Float[Array, "layers y x"]
    depths: Float[Array, " layers"]
    tilt: Float[Array, "2"]
    correction: Complex[Array, "modes y x"] | None
    grid: Grid
    origin: tuple[float, float] = eqx.field(static=True)
    plane: float = eqx.field(static=True)
    cutoff: float = eqx.field(static=True)

    @property
    def order(self) -> int:
        """Highest radial order of the correction; 0 without one."""
        if self.correction is None:
            return 0
        return (math.isqrt(8 * self.correction.shape[0] + 1) - 3) // 2


class Probes(eqx.Module):
    """Each scan's beamlets at the first layer in store, on the padded window."""

    spectra: Complex[Array, "scans states modes ky kx"]


def empty_layers(
    grid: Grid,
    origin: tuple[float, float],
    depths: Float[np.ndarray, " layers"],
    plane: float,
    cutoff: float,
    order: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Layers:
    """Layers without potential; with a correction up to `order` where one is given.

    **Raises:** ValueError for no depths, or depths that do not increase.
    """
    depths = np.asarray(depths, float)
    if len(depths) == 0 or np.any(np.diff(depths) <= 0):
        raise ValueError(f"`depths` of layers must increase and not be empty, got {depths} Å.")
    real = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    potential = jnp.zeros((len(depths), *grid.shape), real)
    kind, correction = np.result_type(real, np.complex64), None
    if order is not None:
        correction = jnp.zeros((mode_count(order), *grid.shape), kind)
    tilt = jnp.zeros(2, real)
    return Layers(
        potential, jnp.asarray(depths, real), tilt, correction, grid, origin, float(plane), cutoff
    )


def layer_waves(
    optics: Optics,
    layers: Layers,
    window: Grid,
    dose: Float[Array, " scans"],
    series: Int[Array, " frames"],
    corner: Int[Array, "frames 2"],
    rest: Float[Array, "frames 2"],
    stretch: Float[Array, ""] | None = None,
    stored: Probes | None = None,
) -> Complex[Array, "frames states y x"]:
    """Exit waves at `layers.plane` of frames whose windows begin at `corner` (pixels).

    `rest` (Å) is where each probe stands beside its window's centre; `stretch` is that of
    `Scattering`; without `stored` probes they are made anew.
    """
    probes = stored or probes_of(optics, layers, window, dose, stretch)
    spectra = probes.spectra
    # The lens does not know of the tilt: a tilted specimen turns about `plane`.
    slopes = jnp.tan(layers.tilt.astype(rest.dtype) * 1e-3) * (1.0 if stretch is None else stretch)
    walk = (layers.depths[0].astype(rest.dtype) - layers.plane) * slopes
    along_y, along_x = shift_ramps(padded(window), rest + walk[None])
    plates = transmission(layers.potential, optics.energy).astype(spectra.dtype)
    steps = propagators(layers, window, optics.energy, stretch).astype(spectra.dtype)
    waves = through_layers(spectra, plates, steps, along_y, along_x, series, corner)
    if layers.correction is None:
        return waves[:, :, 0]
    return jnp.sum(waves * _factors(layers.correction, corner, window.shape)[:, None], axis=2)


def _factors(correction, corner, shape):
    """delta_p0 + c_p in the window of each frame."""
    return jnp.asarray(crops(correction, corner, shape)).at[:, 0].add(1)


def padded(window: Grid) -> Grid:
    """The window with a margin of `GUARD` pixels or more on each side."""
    shape = [next(n for n in range(m + 2 * GUARD, 3 * m + 16) if n % 2 == m % 2 and smooth(n))
             for m in window.shape]  # fmt: skip
    return Grid((shape[0], shape[1]), window.sampling)


def probes_of(
    optics: Optics,
    layers: Layers,
    window: Grid,
    dose: Float[Array, " scans"],
    stretch: Float[Array, ""] | None = None,
) -> Probes:
    """Each scan's beamlets at the first layer, Fourier transformed, in a window with a margin.

    The beamlets stand in the middle, and fade in the margin: cropped sharply they could not be
    shifted by Fourier phases without waves running off the edges (measured: 2 % of the amplitude at
    half a pixel, against 0.1 %).
    """
    large = padded(window)
    real = dose.dtype
    # A lens whose C10 is larger by z makes at z = 0 the probe that this one makes at z.
    defocus = layers.depths[0].astype(real)
    nearer = {"C10": jnp.zeros_like(dose)} | optics.aberrations
    nearer = nearer | {"C10": nearer["C10"] + defocus}
    optics = eqx.tree_at(lambda o: o.aberrations, optics, nearer)
    pattern = jnp.zeros((mode_count(layers.order), 1, 1), np.result_type(real, np.complex64))
    modes = TiltModes(pattern, Grid((1, 1), window.sampling), layers.origin, 0.0, layers.cutoff)
    centre = jnp.zeros(1, real)
    waves = beamlets(optics, modes, large, dose, centre, centre, stretch)[:, 0, 0]
    faded = waves * jnp.asarray(fade(large, window), waves.dtype)[None, None, None]
    return Probes(fft(faded))


def fade(large: Grid, window: Grid) -> Float[np.ndarray, "y x"]:
    """1 in the window, falling as cos² to nothing at the borders of the padded window."""
    profiles = []
    for n, m in zip(large.shape, window.shape, strict=True):
        beyond = np.abs(np.arange(n) - n // 2 + (1 - m % 2) / 2) - m / 2
        profiles.append(np.cos(np.pi / 2 * np.clip(beyond / ((n - m) / 2), 0, 1)) ** 2)
    return profiles[0][:, None] * profiles[1][None, :]


def shift_ramps(
    large: Grid, rest: Float[Array, "frames 2"]
) -> tuple[Complex[Array, "frames ky"], Complex[Array, "frames kx"]]:
    """exp(-2 pi i k.rest), a factor an axis."""
    ky, kx = (
        phase_factor(-2 * math.pi * rest[:, axis, None] * jnp.asarray(k.ravel(), rest.dtype)[None])
        for axis, k in enumerate(large.frequencies())
    )
    return ky, kx


def propagators(
    layers: Layers, window: Grid, energy: float, stretch: Float[Array, ""] | None = None
) -> Complex[Array, "layers ky kx"]:
    """From each layer to the next, and from the last to `plane`."""
    real = layers.depths.dtype
    ends = jnp.append(layers.depths, jnp.asarray(layers.plane, real))
    scale = jnp.ones((), real) if stretch is None else stretch.astype(real)
    # True frequencies are `stretch` times nominal ones: the parabola grows by its square.
    tilt = jnp.arctan(jnp.tan(layers.tilt.astype(real) * 1e-3) / scale) * 1e3
    one = lambda gap: fresnel(window, energy, gap * scale**2, tilt)
    return jax.vmap(one)(ends[1:] - ends[:-1])


@jax.custom_vjp
def through_layers(
    spectra: Complex[Array, "scans states modes large_ky large_kx"],
    plates: Complex[Array, "layers fy fx"],
    steps: Complex[Array, "layers ky kx"],
    along_y: Complex[Array, "frames large_ky"],
    along_x: Complex[Array, "frames large_kx"],
    series: Int[Array, " frames"],
    corner: Int[Array, "frames 2"],
) -> Complex[Array, "frames states modes ky kx"]:
    """Shift each frame's probe, crop it to the window, and carry it through plates and free space.

    On a CPU frame follows frame, so that its waves stay in cache; the reverse pass computes them
    again and adds into plates and spectra in place. Accelerators take all frames together.
    """
    return _through(spectra, plates, steps, along_y, along_x, series, corner)


def _through(*operands):
    return jax.lax.platform_dependent(*operands, cpu=one_by_one, default=all_together)


def carry(spectrum, plates, steps, along_y, along_x):
    """The exit waves of one frame, whose `plates` are cropped already."""
    wave = ifft(spectrum * along_y[None, None, :, None] * along_x[None, None, None, :])
    shape = plates.shape[1:]
    y, x = (n // 2 - m // 2 for n, m in zip(wave.shape[-2:], shape, strict=True))

    def cross(wave, layer):
        plate, step = layer
        return ifft(fft(wave * plate[None, None]) * step[None, None]), None

    wave = wave[..., y : y + shape[0], x : x + shape[1]]
    return jax.lax.scan(cross, wave, (plates, steps), unroll=4)[0]


def one_by_one(spectra, plates, steps, along_y, along_x, series, corner):
    """`through_layers` in a loop over frames."""

    def frame(given):
        along_y, along_x, scan, at = given
        return carry(spectra[scan], window_of(plates, at, steps.shape[1:]), steps, along_y, along_x)

    return jax.lax.map(frame, (along_y, along_x, series, corner))


def all_together(spectra, plates, steps, along_y, along_x, series, corner):
    """`through_layers` for all frames at once, derivable."""
    windows = crops(plates, corner, steps.shape[1:])
    one = lambda spectrum, window, y, x: carry(spectrum, window, steps, y, x)
    return jax.vmap(one)(spectra[series], windows, along_y, along_x)


def _through_reverse(saved, cotangent):
    reverse = partial(jax.lax.platform_dependent, cotangent, *saved)
    return *reverse(cpu=pull_one_by_one, default=pull_together), None, None


def pull_together(cotangent, spectra, plates, steps, along_y, along_x, series, corner):
    """Reverse pass of `all_together`."""
    function = lambda a, b, c, d, e: all_together(a, b, c, d, e, series, corner)
    return jax.vjp(function, spectra, plates, steps, along_y, along_x)[1](cotangent)


def pull_one_by_one(cotangent, spectra, plates, steps, along_y, along_x, series, corner):
    """Reverse pass of `one_by_one`."""
    shape = steps.shape[1:]

    def frame(totals, given):
        to_spectra, to_plates, to_steps = totals
        to, along_y, along_x, scan, at = given
        window = window_of(plates, at, shape)
        pull = jax.vjp(carry, spectra[scan], window, steps, along_y, along_x)[1]
        to_spectrum, to_window, to_step, to_y, to_x = pull(to)
        start = (jnp.zeros((), at.dtype), at[0], at[1])
        patch = window_of(to_plates, at, shape) + to_window
        to_plates = jax.lax.dynamic_update_slice(to_plates, patch, start)
        to_spectra = to_spectra.at[scan].add(to_spectrum)
        return (to_spectra, to_plates, to_steps + to_step), (to_y, to_x)

    totals = tuple(jnp.zeros_like(a) for a in (spectra, plates, steps))
    frames = (cotangent, along_y, along_x, series, corner)
    totals, (to_y, to_x) = jax.lax.scan(frame, totals, frames)
    return *totals, to_y, to_x


through_layers.defvjp(lambda *operands: (_through(*operands), operands), _through_reverse)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def crops(
    planes: Complex[Array, "planes fy fx"], corner: Int[Array, "frames 2"], shape: tuple[int, int]
) -> Complex[Array, "frames planes y x"]:
    """The windows of `shape` pixels that begin at `corner`.

    The derived reverse pass would write the whole field once a frame; the rule adds in place.
    """
    return jax.vmap(lambda at: window_of(planes, at, shape))(corner)


def _crops_reverse(shape, saved, cotangent):
    corner, like = saved

    def add(total, frame):
        at, part = frame
        start = (jnp.zeros((), at.dtype), at[0], at[1])
        patch = window_of(total, at, shape) + part
        return jax.lax.dynamic_update_slice(total, patch, start), None

    return jax.lax.scan(add, jnp.zeros_like(like), (corner, cotangent))[0], None


crops.defvjp(lambda planes, corner, shape: (crops(planes, corner, shape), (corner, planes)),
             _crops_reverse)  # fmt: skip


def to_smatrix(
    layers: Layers, energy: float, order: int | None = None, window: Grid | None = None
) -> SMatrix:
    """The S-matrix of layers on their own, periodic field: tilt modes up to `order`, or beams.

    The wave of each tilt, with the tilt taken out, is carried by propagators that walk sideways
    with it, so that no tilt need fit the field. Beams are those of `window`.

    **Raises:** ValueError unless one of `order` and `window` is given.
    """
    place = layers.origin, layers.plane, layers.cutoff
    if window is not None and order is None:
        points = window_beams(window, layers.cutoff)
        return Beams(_each_tilt(layers, energy, points), layers.grid, window, *place)
    if window is not None or order is None:
        raise ValueError("`to_smatrix` needs `order` for tilt modes or `window` for beams.")
    reach = np.abs(np.asarray(layers.depths, float) - layers.plane).max()
    highest = math.hypot(*(0.5 / d for d in layers.grid.sampling))
    turn = 2 * math.pi * wavelength(energy) * reach * highest * layers.cutoff
    tilts = disc_quadrature(layers.cutoff, turn, order)
    shares = tilts.weights * tilt_polynomials(order, tilts.points, layers.cutoff)
    return TiltModes(_over_tilts(layers, energy, tilts.points, shares), layers.grid, *place)


@eqx.filter_jit
def _each_tilt(layers: Layers, energy: float, points):
    return jax.lax.map(*_tilted(layers, energy, points))


@eqx.filter_jit
def _over_tilts(layers: Layers, energy: float, points, shares):
    """Sum over tilts of s_h times the modes' `shares`."""
    wave_of, tilts = _tilted(layers, energy, points)
    kind = np.result_type(layers.potential.dtype, np.complex64)

    def add(total, tilt):
        share, tilt = tilt
        return total + share[:, None, None] * wave_of(tilt)[None], None

    zero = jnp.zeros((len(shares), *layers.grid.shape), kind)
    return jax.lax.scan(add, zero, (jnp.asarray(shares.T, kind), tilts))[0]


def _tilted(layers: Layers, energy: float, points):
    """The function that gives s_h, and what to call it with for each of `points`."""
    real = layers.potential.dtype
    points, plates = jnp.asarray(points, real), transmission(layers.potential, energy)
    ends = jnp.append(layers.depths, jnp.asarray(layers.plane, layers.depths.dtype)).astype(real)
    slopes = jnp.tan(layers.tilt * 1e-3).astype(real)
    modes = tilt_polynomials(layers.order, points, layers.cutoff).T

    def wave_of(tilt):
        point, polynomials = tilt
        angle = jnp.arctan(slopes + wavelength(energy) * point) * 1e3

        def cross(wave, layer):
            plate, gap = layer
            return convolve(wave * plate, fresnel(layers.grid, energy, gap, angle)), None

        wave = jnp.ones(layers.grid.shape, plates.dtype)
        wave, _ = jax.lax.scan(cross, wave, (plates, ends[1:] - ends[:-1]))
        if layers.correction is None:
            return wave
        share = polynomials.astype(layers.correction.dtype)
        return wave * (1 + jnp.tensordot(share, layers.correction, 1, precision=EXACT))

    return wave_of, (points, modes)
