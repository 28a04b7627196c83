"""The object of ptychography: thin slices of a field, lit by a probe in pixels or by the optics'.

Frame j enters the first slice with its scan's probe, moved to where it stood by an exact Fourier
shift within the window, so that the window must hold the probe. Incoherent states of probe and
object multiply: each state of the probe goes through each of the object, and intensities add.

What the data cannot tell: a constant factor moved from object to probe, a phase ramp of the object
against a shift of the detector, a common shift of positions and object, and, where slices lie
closer than 0.7/(alpha q), how a transfer q is shared among them.
"""

import math
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact, Int

from .coherence import orthogonal_probes
from .crossing import moved, Sway, through_slices
from .fourier import EXACT, fft, ifft, phase_factor
from .grid import Grid
from .layers import enough_tilts, summed_over_tilts, tilted
from .optics import interaction_parameter, Optics, probe
from .passage import shift_ramps
from .propagation import band_mask, fresnel
from .smatrix import TiltModes


Kind = Literal["transmission", "phase", "potential"]
"""What pixels of an object hold: t itself, phi of t = exp(i phi), or V of t = exp(i sigma V)."""


class ObjectSlices(eqx.Module):
    """Slices at `depths` (Å, ascending) on the `grid` of a field with pixel (0, 0) at `origin`.

    `values` are transmissions, phases (rad) or projected potentials (V Å), as `kind` says; real
    phases and potentials absorb nothing, the imaginary part of complex ones does. Incoherent
    states of the object have the parts `shares` of each frame. `tilt` (y, x) mrad is the
    specimen's, one for all frames or one a frame; it turns about the first slice. `band_limit`
    keeps that fraction of the Nyquist frequency behind each slice (None: everything). `keep` is
    that of `crossing.through_slices`: False saves memory and costs time.
    """

    values: Inexact[Array, "states slices y x"]
    depths: Float[Array, " slices"]
    tilt: Float[Array, "*frames 2"]
    shares: Float[Array, " states"]
    grid: Grid
    origin: tuple[float, float] = eqx.field(static=True)
    kind: Kind = eqx.field(static=True, default="transmission")
    band_limit: float | None = eqx.field(static=True, default=None)
    keep: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if self.kind not in ("transmission", "phase", "potential"):
            raise ValueError(
                f"`ObjectSlices.kind` is {self.kind!r}; it must be 'transmission', 'phase' or "
                "'potential'."
            )
        shape = (self.shares.shape[0], self.depths.shape[0], *self.grid.shape)
        if self.values.shape != shape:
            raise ValueError(
                f"`ObjectSlices.values` has shape {self.values.shape}, but {shape[0]} states, "
                f"{shape[1]} depths and a grid of {self.grid.shape} pixels need {shape}."
            )
        if self.kind == "transmission" and not jnp.issubdtype(
            self.values.dtype, jnp.complexfloating
        ):
            raise ValueError("`ObjectSlices.values` of kind 'transmission' must be complex.")

    def transmission(self, energy: float) -> Complex[Array, "states slices y x"]:
        """What each slice multiplies the wave by, for electrons of `energy` eV."""
        if self.kind == "transmission":
            return self.values
        scale = 1.0 if self.kind == "phase" else interaction_parameter(energy)
        if not jnp.issubdtype(self.values.dtype, jnp.complexfloating):
            return phase_factor(scale * self.values)
        fade = jnp.exp(-scale * self.values.imag).astype(self.values.dtype)
        return phase_factor(scale * self.values.real) * fade

    def phase(self, energy: float) -> Float[Array, "states slices y x"]:
        """Phase shift of each slice, rad; that of transmissions lies within -pi to pi."""
        if self.kind == "transmission":
            return jnp.angle(self.values)
        return self.values.real * (1.0 if self.kind == "phase" else interaction_parameter(energy))


class Illumination(eqx.Module):
    """Probes in pixels: `modes` of each scan in the plane of the first slice, root electrons.

    They are centred on pixel n//2 of the window; the sum of |mode|² over pixels and states is the
    electrons of a frame. `variations` let the first mode change from frame to frame (orthogonal
    probe relaxation): frame j adds sum_c weights[j, c] variations[c] to it.
    """

    modes: Complex[Array, "scans states y x"]
    variations: Complex[Array, "components y x"] | None = None
    weights: Float[Array, "frames components"] | None = None

    def __check_init__(self):
        if (self.variations is None) != (self.weights is None):
            raise ValueError("`Illumination` needs both `variations` and `weights`, or neither.")


class Shifted(eqx.Module):
    """Positions that share a remainder share a probe: `rest` (Å) of each row, and frames' rows."""

    rest: Float[Array, "rows 2"]
    scan: Int[Array, " rows"]
    entry: Int[Array, " frames"]


def empty_object(
    grid: Grid,
    origin: tuple[float, float],
    depths: Sequence[float] | Float[np.ndarray, " slices"],
    kind: Kind = "transmission",
    states: int = 1,
    absorbing: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    **static,
) -> ObjectSlices:
    """Slices at `depths` (Å) that do nothing; phases and potentials are complex if `absorbing`.

    **Raises:** ValueError for no depths, or depths that do not increase.
    """
    depths = np.asarray(depths, float)
    if len(depths) == 0 or np.any(np.diff(depths) <= 0):
        raise ValueError(f"`depths` of slices must increase and not be empty, got {depths} Å.")
    real = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    shape, kinds = (states, len(depths), *grid.shape), np.result_type(real, np.complex64)
    if kind == "transmission":
        values = jnp.ones(shape, kinds)
    else:
        values = jnp.zeros(shape, kinds if absorbing else real)
    shares = jnp.full(states, 1 / states, real)
    return ObjectSlices(
        values, jnp.asarray(depths, real), jnp.zeros(2, real), shares, grid, origin, kind, **static
    )


def illuminate(
    optics: Optics,
    window: Grid,
    dose: Float[Array, " scans"],
    depth: Float[Array, ""] | float,
) -> Complex[Array, "scans states y x"]:
    """The optics' probes at `depth` (Å) in the middle of a periodic window, root electrons."""
    centre = jnp.asarray([n // 2 * d for n, d in zip(window.shape, window.sampling, strict=True)])
    waves = probe(optics, window, centre.astype(dose.dtype))
    step = fresnel(window, optics.energy, jnp.asarray(depth, dose.dtype)).astype(waves.dtype)
    waves = ifft(fft(waves) * step[None, None])
    return waves * jnp.sqrt(dose)[:, None, None, None].astype(waves.dtype)


def pixel_probes(
    optics: Optics,
    window: Grid,
    dose: Float[Array, " scans"],
    depth: float,
    states: int = 1,
    weakest: float = 0.15,
) -> Illumination:
    """The optics' probe to start from, with further states of Hermite-Gauss shape.

    All states but the first share the part `weakest` of the intensity; they are the probe times
    polynomials of the coordinates, made orthogonal, the lowest orders first.
    """
    first = illuminate(optics, window, dose, depth)[:, :1]
    if states == 1:
        return Illumination(first)
    y, x = (np.arange(n) / n - n // 2 / n for n in window.shape)
    orders = sorted((p + q, p) for p in range(states) for q in range(states))[:states]
    shapes = np.stack([np.outer(y**p, x ** (total - p)) for total, p in orders])
    modes = first * jnp.asarray(shapes, first.dtype)[None]
    flat = modes.reshape(*modes.shape[:2], -1)
    basis = jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(flat, 1, 2))[0], 1, 2).reshape(modes.shape)
    parts = np.array([1 - weakest, *[weakest / (states - 1)] * (states - 1)])
    size = jnp.sqrt(dose[:, None] * jnp.asarray(parts, dose.dtype)[None])
    # QR leaves a phase on each column.
    turn = jnp.sum(basis[:, :1].conj() * first, axis=(2, 3), keepdims=True)
    basis = basis.at[:, :1].multiply(turn / jnp.abs(turn).astype(turn.dtype))
    return Illumination(basis * size[:, :, None, None].astype(basis.dtype))


def orthogonalised(illumination: Illumination) -> Illumination:
    """The same incoherent states as orthogonal modes, the brightest first."""
    flat = illumination.modes.reshape(*illumination.modes.shape[:2], -1)
    modes = jax.vmap(lambda scan: orthogonal_probes(scan)[0])(flat)
    return eqx.tree_at(lambda i: i.modes, illumination, modes.reshape(illumination.modes.shape))


def propagators(
    specimen: ObjectSlices, window: Grid, energy: float
) -> tuple[Complex[Array, "gaps ky kx"], Sway | None]:
    """From each slice to the next; a tilt of each frame's own comes as factors of its own."""
    real = specimen.depths.dtype
    gaps, tilt = specimen.depths[1:] - specimen.depths[:-1], specimen.tilt.astype(real)
    own = tilt.ndim == 2
    common = jnp.zeros(2, real) if own else tilt
    steps = jax.vmap(lambda gap: fresnel(window, energy, gap, common))(gaps)
    if specimen.band_limit is not None:
        steps = steps * band_mask(window, specimen.band_limit).astype(steps.dtype)[None]
    if not own:
        return steps, None
    walks = []
    for axis, k in enumerate(window.frequencies()):
        slope = jnp.tan(tilt[:, axis] * 1e-3)[:, None, None] * gaps[None, :, None]
        walks.append(phase_factor(-2 * math.pi * slope * jnp.asarray(k.ravel(), real)[None, None]))
    return steps, Sway(*walks)


def object_waves(
    optics: Optics,
    specimen: ObjectSlices,
    illumination: Illumination | None,
    window: Grid,
    dose: Float[Array, " scans"],
    series: Int[Array, " frames"],
    corner: Int[Array, "frames 2"],
    rest: Float[Array, "frames 2"],
    index: Int[Array, " frames"],
    plan: Shifted | None = None,
) -> Complex[Array, "frames states y x"]:
    """Exit waves behind the last slice, all states of the probe for each state of the object.

    **Arguments:** `corner` (pixels) is where the frames' windows begin, `rest` (Å) where the
    probes stand beside their centres, `index` the frames' numbers.
    """
    lit = lit_slices(
        optics, specimen, illumination, window, dose, series, corner, rest, index, plan
    )
    waves, plates, steps, sway, row, corner = lit

    def state(o):
        leave = through_slices(waves, plates[o], steps, sway, row, corner, specimen.keep)
        return leave * jnp.sqrt(specimen.shares[o]).astype(leave.dtype)

    states = [state(o) for o in range(plates.shape[0])]
    return states[0] if len(states) == 1 else jnp.concatenate(states, axis=1)


def lit_slices(
    optics, specimen, illumination, window, dose, series, corner, rest, index, plan=None
):
    """What `crossing.through_slices` takes, but with a stack of plates for each object state."""
    if illumination is None:
        modes = entrance_modes(optics, specimen, None, window, dose)
        illumination = Illumination(modes)
    waves, row = entering(illumination, window, series, rest, index, plan)
    plates = specimen.transmission(optics.energy).astype(waves.dtype)
    steps, sway = propagators(specimen, window, optics.energy)
    if sway is not None:
        sway = Sway(*(a[index].astype(waves.dtype) for a in sway))
    return waves, plates, steps.astype(waves.dtype), sway, row, corner


def entrance_modes(
    optics: Optics,
    specimen: ObjectSlices,
    illumination: Illumination | None,
    window: Grid,
    dose: Float[Array, " scans"],
) -> Complex[Array, "scans states y x"]:
    """Each scan's probe before the first slice, as it is given or as the optics make it."""
    if illumination is not None:
        return illumination.modes
    return illuminate(optics, window, dose, specimen.depths[0])


def entering(
    illumination: Illumination,
    window: Grid,
    series: Int[Array, " frames"],
    rest: Float[Array, "frames 2"],
    index: Int[Array, " frames"],
    plan: Shifted | None = None,
) -> tuple[Complex[Array, "rows states y x"], Int[Array, " frames"]]:
    """The probes before the first slice, moved to where frames have them, and each frame's row."""
    modes = illumination.modes
    if illumination.variations is None and plan is not None:
        return moved(fft(modes), *shift_ramps(window, plan.rest), plan.scan), plan.entry[index]
    each = jnp.arange(index.shape[0], dtype=jnp.int32)
    if illumination.variations is not None:
        modes, series = _varied(illumination, series, index), each
    return moved(fft(modes), *shift_ramps(window, rest), series), each


def _varied(illumination: Illumination, series, index) -> Complex[Array, "frames states y x"]:
    modes, more, weights = illumination.modes[series], illumination.variations, illumination.weights
    assert more is not None and weights is not None
    weights = weights[index].astype(more.dtype)
    shape = modes.shape[2:]
    extra = jnp.matmul(weights, more.reshape(more.shape[0], -1), precision=EXACT)
    return modes.at[:, 0].add(extra.reshape(-1, *shape))


def shared_remainders(
    rest: Float[np.ndarray, "frames 2"],
    series: Int[np.ndarray, " frames"],
    sampling: tuple[float, float],
) -> Shifted | None:
    """The plan of a raster whose positions share remainders; None where hardly any do."""
    # A thousandth of a pixel moves no electron; float32 positions are as good as that.
    level = np.rint(np.asarray(rest, float) / sampling * 1024).astype(int)
    keys = np.column_stack([level, np.asarray(series)])
    found, entry = np.unique(keys, axis=0, return_inverse=True)
    if len(found) > len(rest) // 4:
        return None
    kept = jnp.asarray(found[:, :2] / 1024 * np.asarray(sampling), rest.dtype)
    scan, entry = (jnp.asarray(a.reshape(-1), jnp.int32) for a in (found[:, 2], entry))
    return Shifted(kept, scan, entry)


def tilt_waves(
    specimen: ObjectSlices, energy: float, cutoff: float, plane: float, order: int
) -> TiltModes:
    """The S-matrix of the first object state in tilt modes up to `order`, referred to `plane` (Å).

    As `layers.to_smatrix`: the wave of each tilt, with the tilt taken out, on the periodic field.
    """
    points, shares = enough_tilts(specimen.depths, plane, specimen.grid, energy, cutoff, order)
    waves = _over_tilts(specimen, energy, plane, points, shares)
    return TiltModes(waves, specimen.grid, specimen.origin, plane, cutoff)


@eqx.filter_jit
def _over_tilts(specimen: ObjectSlices, energy: float, plane: float, points, shares):
    plates, tilt = specimen.transmission(energy)[0], jnp.atleast_2d(specimen.tilt)[0]
    wave_of = tilted(plates, specimen.depths, plane, tilt, specimen.grid, energy)
    points = jnp.asarray(points, specimen.depths.dtype)
    return summed_over_tilts(wave_of, points, jnp.asarray(shares))
