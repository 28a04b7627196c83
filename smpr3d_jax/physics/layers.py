"""The specimen as layers that can be fitted: multislice of each frame's probe in its own window.

A few thin layers turn the phase of the wave by sigma V; between them it crosses free space. The
probe of a frame is made at the first layer as it is in infinite space, and cropped to the window;
from there on the window is periodic: what walks out on one side comes in on the other. So the
window must hold the probe at every layer and at `plane`, where the exit wave is handed over:
extent >= 2 alpha |depth - defocus| + 3 lambda/alpha, as for the S-matrix. Where the camera has a
wide window, the probe's tails go on in it as through one layer that holds the potential of all;
the window then adds by how much the layers differ from that one.

`correction` multiplies what the layers make of each tilt, S = multislice (1 + sum_p c_p(r) Q_p(h)),
with the tilt polynomials of `smatrix`; it costs one multislice for each of its modes.

What the data cannot tell: all depths moved with all defoci; and, as the layers are thin, a tilt
from layers shifted sideways by -tan(tilt) times their depths.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, PyTree

from .beamlets import beamlets
from .fourier import convolve, EXACT, fft
from .grid import Grid
from .optics import Optics, wavelength
from .passage import crops, fade, padded, shift_ramps, shifted, through_layers
from .propagation import fresnel, transmission
from .smatrix import Beams, disc_quadrature, SMatrix, TiltModes, window_beams
from .windows import inset
from .zernike import mode_count, tilt_polynomials


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
    """Fourier transforms of each scan's probe in windows with a margin: see `probes_of`.

    `spectra` are those of the beamlets at the first layer, `around` (None without a wide window)
    those of the probe at `Layers.plane` in the wide window.
    """

    spectra: Complex[Array, "scans states modes ky kx"]
    around: Complex[Array, "scans states wide_ky wide_kx"] | None


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
    windows: tuple[Grid, Grid | None],
    dose: Float[Array, " scans"],
    series: Int[Array, " frames"],
    corner: Int[Array, "frames 2"],
    rest: Float[Array, "frames 2"],
    stretch: Float[Array, ""] | None = None,
    stored: Probes | None = None,
) -> Complex[Array, "frames states y x"]:
    """Exit waves at `layers.plane`, in the wide one of `windows` where there is one.

    **Arguments:** `corner` (pixels) is where the frames' windows begin, `rest` (Å) where the probes
    stand beside their centres; `stretch` is that of `Scattering`; without `stored` probes they are
    made anew.
    """
    window, wide = windows
    probes = stored or probes_of(optics, layers, windows, dose, stretch)
    kind = probes.spectra.dtype
    # The lens does not know of the tilt: a tilted specimen turns about `plane`.
    slopes = jnp.tan(layers.tilt.astype(rest.dtype) * 1e-3) * (1.0 if stretch is None else stretch)
    walk = (layers.depths[0].astype(rest.dtype) - layers.plane) * slopes
    ramps = shift_ramps(padded(window), rest + walk[None])
    plates = transmission(layers.potential, optics.energy).astype(kind)
    steps = propagators(layers, window, optics.energy, stretch).astype(kind)
    if wide is not None:
        steps = jnp.concatenate([steps, jnp.prod(steps, axis=0)[None]])
    waves = through_layers(probes.spectra, plates, steps, *ramps, series, corner)
    waves, free = (waves, None) if wide is None else (waves[:, :, :-1], waves[:, :, -1])
    if layers.correction is None:
        waves = waves[:, :, 0]
    else:
        factor = jnp.asarray(crops(layers.correction, corner, window.shape)).at[:, 0].add(1)
        waves = jnp.sum(waves * factor[:, None].astype(kind), axis=2)
    if free is None or wide is None or probes.around is None:
        return waves
    plate = crops(_one_for_all(layers, optics.energy, window, wide)[None], corner, wide.shape)
    tails = shifted(probes.around[series], shift_ramps(padded(wide), rest), wide.shape)
    top, left = inset(window.shape, wide.shape)
    inner = (..., slice(top, top + window.shape[0]), slice(left, left + window.shape[1]))
    plate = jnp.asarray(plate, kind)
    return (tails * plate).at[inner].add(waves - free * plate[inner])


def _one_for_all(layers: Layers, energy: float, window: Grid, wide: Grid) -> Complex[Array, "Y X"]:
    """The plate that acts as all layers at `plane` would, and nothing around the field.

    So far around it that the wide window of a frame begins where its window does in the field.
    """
    plate = transmission(jnp.sum(layers.potential, axis=0), energy)
    if layers.correction is not None:
        plate = plate * (1 + layers.correction[0])
    low = inset(window.shape, wide.shape)
    high = [m - n - a for m, n, a in zip(wide.shape, window.shape, low, strict=True)]
    return jnp.pad(plate, list(zip(low, high, strict=True)), constant_values=1)


def probes_of(
    optics: Optics,
    layers: Layers,
    windows: tuple[Grid, Grid | None],
    dose: Float[Array, " scans"],
    stretch: Float[Array, ""] | None = None,
) -> Probes:
    """Each scan's beamlets in the middle of `windows` (the second is the wide one, if any).

    They fade in a margin: cropped sharply they could not be shifted by Fourier phases without waves
    running off the edges (measured: 2 % of the amplitude at half a pixel, against 0.1 %).
    """
    centre = jnp.zeros(1, dose.dtype)

    def spectra(order, depth, window):
        large = padded(window)
        # A lens whose C10 is larger by z makes at z = 0 the probe that this one makes at z.
        nearer = {"C10": jnp.zeros_like(dose)} | optics.aberrations
        nearer = nearer | {"C10": nearer["C10"] + depth}
        lens = eqx.tree_at(lambda o: o.aberrations, optics, nearer)
        pattern = jnp.zeros((mode_count(order), 1, 1), np.result_type(dose.dtype, np.complex64))
        modes = TiltModes(pattern, Grid((1, 1), window.sampling), layers.origin, 0.0, layers.cutoff)
        # One period for all windows, that of the S-matrix, so that they agree on every electron.
        waves = beamlets(lens, modes, large, dose, centre, centre, stretch, windows[0])[:, 0, 0]
        return fft(waves * jnp.asarray(fade(large, window), waves.dtype)[None, None, None])

    window, wide = windows
    first = spectra(layers.order, layers.depths[0].astype(dose.dtype), window)
    around = None if wide is None else spectra(0, layers.plane, wide)[:, :, 0]
    return Probes(first, around)


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
    points, shares = enough_tilts(
        layers.depths, layers.plane, layers.grid, energy, layers.cutoff, order
    )
    return TiltModes(_over_tilts(layers, energy, points, shares), layers.grid, *place)


def enough_tilts(
    depths: Float[Array, " slices"],
    plane: float,
    grid: Grid,
    energy: float,
    cutoff: float,
    order: int,
) -> tuple[Float[np.ndarray, "tilts 2"], Float[np.ndarray, "modes tilts"]]:
    """Tilts (1/Å) that sample what slices at `depths` make of them, and each one's modes' shares.

    `plane` (Å) is the one that s_h is referred to.
    """
    reach = np.abs(np.asarray(depths, float) - plane).max()
    highest = math.hypot(*(0.5 / d for d in grid.sampling))
    turn = 2 * math.pi * wavelength(energy) * reach * highest * cutoff
    tilts = disc_quadrature(cutoff, turn, order)
    return tilts.points, tilts.weights * tilt_polynomials(order, tilts.points, cutoff)


@eqx.filter_jit
def _each_tilt(layers: Layers, energy: float, points):
    return jax.lax.map(*_tilted(layers, energy, points))


@eqx.filter_jit
def _over_tilts(layers: Layers, energy: float, points, shares):
    return summed_over_tilts(*_tilted(layers, energy, points), jnp.asarray(shares))


def summed_over_tilts(
    wave_of: Callable[..., Complex[Array, "y x"]],
    tilts: PyTree,
    shares: Float[Array, "modes tilts"],
) -> Complex[Array, "modes y x"]:
    """Sum over `tilts` of the waves s_h times the modes' `shares`."""
    like = jax.eval_shape(wave_of, jax.tree.map(lambda a: a[0], tilts))

    def add(total, tilt):
        share, tilt = tilt
        return total + share[:, None, None] * wave_of(tilt)[None], None

    zero = jnp.zeros((len(shares), *like.shape), like.dtype)
    return jax.lax.scan(add, zero, (shares.T.astype(like.dtype), tilts))[0]


def _tilted(layers: Layers, energy: float, points):
    """The function that gives s_h, and what to call it with for each of `points`."""
    real = layers.potential.dtype
    points, plates = jnp.asarray(points, real), transmission(layers.potential, energy)
    cross = tilted(plates, layers.depths, layers.plane, layers.tilt, layers.grid, energy)
    modes = tilt_polynomials(layers.order, points, layers.cutoff).T

    def wave_of(tilt):
        point, polynomials = tilt
        wave = cross(point)
        if layers.correction is None:
            return wave
        share = polynomials.astype(layers.correction.dtype)
        return wave * (1 + jnp.tensordot(share, layers.correction, 1, precision=EXACT))

    return wave_of, (points, modes)


def tilted(
    plates: Complex[Array, "slices y x"],
    depths: Float[Array, " slices"],
    plane: float,
    tilt: Float[Array, "2"],
    grid: Grid,
    energy: float,
) -> Callable[[Float[Array, "2"]], Complex[Array, "y x"]]:
    """From a point h of the aperture (1/Å) to s_h, what `plates` make of that tilt, at `plane`.

    The tilt is taken out: propagators walk sideways with it. `tilt` is the specimen's, mrad.
    """
    real = plates.real.dtype
    ends = jnp.append(depths, jnp.asarray(plane, depths.dtype)).astype(real)
    slopes = jnp.tan(tilt * 1e-3).astype(real)

    def wave_of(point):
        angle = jnp.arctan(slopes + wavelength(energy) * point) * 1e3

        def cross(wave, layer):
            plate, gap = layer
            return convolve(wave * plate, fresnel(grid, energy, gap, angle)), None

        wave = jnp.ones(grid.shape, plates.dtype)
        return jax.lax.scan(cross, wave, (plates, ends[1:] - ends[:-1]))[0]

    return wave_of
