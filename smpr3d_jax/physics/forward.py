"""The forward model: a pytree that turns frame indices into expected electrons.

In tilt modes the exit wave of a frame is a sum over modes of a window of the specimen times a
beamlet (`beamlets`). In beams it is sum_h Psi(h) exp(-2 pi i h.rho) exp(2 pi i h.r) s_h(r), a
matrix product over beams for a block of neighbouring positions at once. The probe may have several
incoherent states, whose intensities add.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, PyTree

from .beamlets import (
    Beamlets,
    Ladder,
    ladder,
    spread_levels,
    summed,
    tabulated,
)
from .coherence import source_nodes
from .crossing import mean_seen
from .detector import Detector
from .fourier import EXACT, phase_factor, product
from .grid import Grid
from .layers import layer_waves, Layers, Probes, probes_of
from .optics import Optics, pupil
from .ptychography import (
    Illumination,
    lit_slices,
    object_waves,
    ObjectSlices,
    shared_remainders,
    Shifted,
)
from .scan import Scan
from .smatrix import Beams, field, place, SMatrix, TiltModes, unscattered_beams, unscattered_modes
from .sparse import pattern_at
from .windows import window_of


class Blocks(eqx.Module):
    """Frames of one call lie within `reach` (y, x) pixels of each other and share one product.

    Calls whose frames do not are evaluated frame by frame: slower, never wrong.
    """

    reach: tuple[int, int] = eqx.field(static=True)


class Scattering(eqx.Module):
    """Optics, a specimen, a scan and a camera: `model(index)` gives the expected frames.

    `specimen` is an `SMatrix`, `Layers` or `ObjectSlices`; a `plan` is one of `prepare`'s. The
    last may have an `illumination` in pixels; without one the optics make the probes.

    `dose` is the mean number of electrons per frame of each scan, `exposure` the share of it that
    each frame had (None: all of it). `stretch` is the true over the nominal angle of a detector
    pixel (None: 1); the grids keep the nominal one. Without a `plan` every frame is evaluated on
    its own, differentiably in all leaves; `prepare` makes the plan for speed.
    """

    optics: Optics
    specimen: Any
    scan: Scan
    detector: Detector
    dose: Float[Array, " scans"]
    plan: Any = None
    exposure: Float[Array, " frames"] | None = None
    stretch: Float[Array, ""] | None = None
    illumination: Illumination | None = None

    def __call__(self, index: Int[Array, " frames"]) -> Float[Array, "frames ky kx"]:
        share = None if self.exposure is None else self.exposure[index]
        return _seen(self.detector, exit_waves(self, index), share)

    def at(
        self, index: Int[Array, " frames"], pixels: Int[Array, "frames hits"]
    ) -> tuple[Float[Array, " frames"], Float[Array, "frames hits"]]:
        """Expected electrons of each frame, and at each of its flat `pixels`: see `pattern_at`."""
        camera, waves = self.detector, exit_waves(self, index)
        if camera.blur is not None:
            frames = self(index).reshape(index.shape[0], -1)
            return jnp.sum(frames, axis=1), jnp.take_along_axis(frames, pixels, axis=1)
        total, hit = pattern_at(
            waves, pixels, camera.integration, camera.offset, shape=camera.shape
        )
        if self.exposure is not None:
            share = self.exposure[index]
            total, hit = total * share, hit * share[:, None]
        if camera.background is not None:
            level = jnp.abs(camera.background)
            total, hit = total + level * math.prod(camera.shape), hit + level
        return total, hit

    def mean(
        self,
        misfit: Callable[..., Float[Array, " frames"]],
        index: Int[Array, " frames"],
        own: PyTree,
        common: PyTree = None,
    ) -> Float[Array, ""]:
        """Mean over frames of `misfit(intensity, own, common)`, as fast as the specimen permits.

        `own`, such as counts, has an entry for each frame.
        """
        specimen = self.specimen
        if not isinstance(specimen, ObjectSlices) or specimen.values.shape[0] > 1:
            return jnp.mean(misfit(self(index), own, common))

        def see(given, wave, own):
            camera, common = given
            own, share = jax.tree.map(lambda a: a[None], own)
            return misfit(_seen(camera, wave[None], share), own, common)[0]

        waves, plates, steps, sway, row, corner = lit_slices(*_lit(self, index))
        waves = waves * jnp.sqrt(specimen.shares[0]).astype(waves.dtype)
        share = None if self.exposure is None else self.exposure[index]
        given = (self.detector, common)
        return mean_seen(
            see, given, waves, plates[0], steps, sway, row, corner, (own, share), specimen.keep
        )

    @property
    def window(self) -> Grid:
        """The window seen by one probe."""
        return self.detector.window(self.optics.wavelength)

    @property
    def halo(self) -> Grid | None:
        """The wider window in which the probe of tilt modes goes on, if the camera has one."""
        return self.detector.wide_window(self.optics.wavelength)

    def refreshed(self, moving: PyTree[bool]) -> "Scattering":
        """The model with what it keeps in store made to agree with the leaves that are `moving`.

        `moving` has the structure of the model. Hands back the very leaves that need not change.
        """
        if isinstance(self.plan, Probes):
            lens = (moving.optics, moving.dose, moving.stretch, moving.specimen.depths)
            fresh = _probes(self) if any(jax.tree.leaves(lens)) else self.plan
            return eqx.tree_at(lambda m: m.plan, self, fresh)
        # The source moves along the ladder, which stays.
        lens = (moving.optics.of_point(), moving.dose, moving.stretch)
        if isinstance(self.plan, Ladder) and any(jax.tree.leaves(lens)):
            return eqx.tree_at(
                lambda m: m.plan.table, self, _ladder(self, self.plan.per_pixel).table
            )
        return self


def _seen(camera: Detector, waves, share: Float[Array, " frames"] | None):
    """What a camera counts of each frame's exit waves, whose states add."""
    total = jnp.sum(camera(waves), axis=1)
    return camera.readout(total if share is None else total * share[:, None, None])


def unscattered(
    optics: Optics,
    detector: Detector,
    scan: Scan,
    dose: Float[Array, " scans"],
    plane: float,
    order: int | None = 8,
    slack: float = 0.0,
) -> Scattering:
    """The model of an empty specimen on the field that the scan's windows cover: where to start.

    `plane` (Å) is the depth to which both sides of S are referred, best the middle of the
    specimen. `order` of the tilt polynomials; None for beams. Positions may move by `slack` Å
    before their windows leave the field; a source of finite size has its own room.
    """
    window = detector.window(optics.wavelength)
    # A source may turn out half as large again as it was thought to be.
    slack = slack + 1.5 * _reach(optics)
    margin = 1 + math.ceil(slack / min(window.sampling))
    seen = None if order is None else detector.wide_window(optics.wavelength)
    grid, origin = field(np.asarray(scan.positions, float), seen or window, margin)
    if order is None:
        specimen: SMatrix = unscattered_beams(grid, window, origin, plane, optics.cutoff)
    else:
        specimen = unscattered_modes(grid, origin, plane, optics.cutoff, order)
    return Scattering(optics, specimen, scan, detector, dose)


def settled(model: Scattering) -> Scattering:
    """The model with the refined camera length as its nominal one: grids are then true."""
    if model.stretch is None:
        return model
    scale, old = float(model.stretch), model.specimen
    y, x = (d / scale for d in old.grid.sampling)
    middle = _middle(old, float)[0]
    top, left = (float(m + (o - m) / scale) for m, o in zip(middle, old.origin, strict=True))
    grid = Grid(old.grid.shape, (y, x))
    specimen = dataclasses.replace(old, grid=grid, origin=(top, left))
    if isinstance(specimen, Beams):
        specimen = dataclasses.replace(specimen, window=Grid(specimen.window.shape, (y, x)))
    # Polynomials of the tilt are those of the nominal angle.
    specimen = dataclasses.replace(specimen, cutoff=specimen.cutoff * scale)
    detector = dataclasses.replace(model.detector, pixel=model.detector.pixel * scale)
    return dataclasses.replace(model, specimen=specimen, detector=detector, plan=None, stretch=None)


def trimmed(model: Scattering) -> Scattering:
    """The model on the field of its windows alone, without the rim into which the probe goes on.

    For what is seen of a specimen; to go on with a reconstruction keep the whole.
    """
    old = model.specimen
    if isinstance(old, Beams | Layers | ObjectSlices) or model.halo is None:
        return model
    grid, origin = field(np.asarray(model.scan.positions, float), model.window)
    pixels = np.subtract(origin, old.origin) / old.grid.sampling
    shape = [min(a, b) for a, b in zip(grid.shape, old.grid.shape, strict=True)]
    room = np.subtract(old.grid.shape, shape)
    top, left = (int(p) for p in np.clip(np.rint(pixels), 0, room))
    y, x = (o + p * d for o, p, d in zip(old.origin, (top, left), old.grid.sampling, strict=True))
    waves = old.waves[:, top : top + shape[0], left : left + shape[1]]
    grid = Grid((shape[0], shape[1]), old.grid.sampling)
    specimen = dataclasses.replace(old, waves=waves, grid=grid, origin=(y, x))
    camera = dataclasses.replace(model.detector, halo=False)
    return dataclasses.replace(model, specimen=specimen, detector=camera, plan=None)


def exit_waves(
    model: Scattering, index: Int[Array, " frames"]
) -> Complex[Array, "frames states y x"]:
    """The wave behind the specimen, in the window of each frame, referred to the mid-plane.

    On a ladder the windows of states from beside the source's centre may begin pixels away.
    """
    positions, series = model.scan.positions[index], model.scan.series[index]
    if model.stretch is not None:
        middle = _middle(model.specimen, positions.dtype)
        positions = middle + (positions - middle) * model.stretch
    if isinstance(model.plan, Ladder) and isinstance(model.specimen, TiltModes):
        return _ladder_waves(model, model.specimen, model.plan, series, positions)
    if isinstance(model.specimen, ObjectSlices):
        return object_waves(*_lit(model, index))
    corner, rest = place(model.specimen, positions, model.window)
    if isinstance(model.specimen, Layers):
        return layer_waves(
            model.optics, model.specimen, (model.window, model.halo), model.dose, series, corner,
            rest, model.stretch, model.plan if isinstance(model.plan, Probes) else None,
        )  # fmt: skip
    if isinstance(model.specimen, Beams):
        return _beam_waves(model, model.specimen, series, corner, rest)
    return _mode_waves(model, model.specimen, series, corner, rest, index)


def _lit(model: Scattering, index):
    """The arguments of `object_waves`."""
    if model.stretch is not None:
        raise ValueError(
            "`Scattering.stretch`: the camera length of an object in slices is its sampling; "
            "change `detector.pixel` instead."
        )
    corner, rest = place(model.specimen, model.scan.positions[index], model.window)
    plan = model.plan if isinstance(model.plan, Shifted) else None
    return (
        model.optics, model.specimen, model.illumination, model.window, model.dose,
        model.scan.series[index], corner, rest, index, plan,
    )  # fmt: skip


def _middle(specimen, dtype) -> Float[Array, "1 2"]:
    """The middle of the field, which a camera length leaves where it is."""
    half = [n * d / 2 for n, d in zip(specimen.grid.shape, specimen.grid.sampling, strict=True)]
    return jnp.asarray(np.add(specimen.origin, half), dtype)[None]


def _mode_waves(model: Scattering, specimen: TiltModes, series, corner, rest, index):
    plan = model.plan
    if isinstance(plan, Beamlets):
        table, entry = plan.table, plan.entry[index]
    else:
        one = lambda scan, offset: _beamlets_at(model, specimen, scan, offset)
        table = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), jax.vmap(one)(series, rest))
        entry = jnp.arange(index.shape[0], dtype=jnp.int32) * model.optics.states
    states = model.optics.states
    rows = (entry[:, None] + jnp.arange(states, dtype=entry.dtype)[None]).reshape(-1)
    waves = summed(specimen.waves, table, jnp.repeat(corner, states, axis=0), rows)
    return waves.reshape(-1, states, *waves.shape[1:])


def _ladder_waves(model: Scattering, specimen: TiltModes, plan: Ladder, series, positions):
    """A source of finite size moves the probe along the ladder, so that it needs no rungs more."""
    frames, optics = positions.shape[0], model.optics
    shares = None
    if optics.source is not None:
        around, weights = source_nodes(optics.source, optics.source_rings)
        shares = jnp.sqrt(weights)
        if model.stretch is not None:
            around = around * model.stretch
        series = jnp.repeat(series, len(weights))
        positions = (positions[:, None] + around[None]).reshape(-1, 2)
    corner, rest = place(specimen, positions, model.window)
    entry = plan.rows(series, rest, model.window)
    rows = (entry[:, None] + jnp.arange(plan.states, dtype=entry.dtype)[None]).reshape(-1)
    corner, rest = (jnp.repeat(a, plan.states, axis=0) for a in (corner, rest))
    layout = plan.layout(model.window)
    waves = summed(specimen.waves, plan.table, corner, rows, rest, layout)
    waves = waves.reshape(frames, -1, *waves.shape[1:])
    if shares is None:
        return waves
    shares = jnp.repeat(shares, plan.states).astype(waves.dtype)
    return waves * shares[None, :, None, None]


def _beamlets_at(model, specimen, scan, offset):
    optics = model.optics.of_scan(scan)
    dose = model.dose[scan][None]
    y, x = offset[:1], offset[1:]
    return tabulated(optics, specimen, model.window, model.halo, dose, y, x, model.stretch)


def _probes(model: Scattering) -> Probes:
    specimen = model.specimen
    assert isinstance(specimen, Layers)  # only they have such probes
    windows = (model.window, model.halo)
    return probes_of(model.optics, specimen, windows, model.dose, model.stretch)


def _ladder(model: Scattering, per_pixel: int) -> Ladder:
    specimen = model.specimen
    assert isinstance(specimen, TiltModes)  # only they have ladders
    lens = model.optics.of_point()
    windows = (model.window, model.halo)
    return ladder(lens, specimen, *windows, model.dose, model.stretch, per_pixel)


def prepare(
    model: Scattering,
    per_pixel: int = 8,
    chunk: Int[np.ndarray, "chunks frames"] | None = None,
    moving: Sequence[str] = (),
) -> Scattering:
    """The model with the plan that makes it fast.

    In tilt modes the beamlets are tabulated over the sub-pixel remainders of the positions: exact
    where an axis has at most `per_pixel` distinct ones (a raster commensurate with the pixels),
    otherwise positions are rounded to 1/`per_pixel` of a pixel. Where leaves of optics, scan, dose
    or stretch will move, name them (`moving`, as in `per_leaf`): the table is then a ladder of six
    steps a pixel, which they move through, as it is for a source of finite size. In beams the
    reach of the frames of each row of `chunk` is noted. Layers have the probe of each scan in
    store, exactly.

    **Raises:** ValueError for a source whose probes would stand outside the field.
    """
    corner, rest = place(model.specimen, model.scan.positions, model.window)
    plan: Any
    if isinstance(model.specimen, ObjectSlices):
        series, moves = np.asarray(model.scan.series), _moves(moving, ("scan",))
        plan = None if moves else shared_remainders(np.asarray(rest), series, model.window.sampling)
    elif isinstance(model.specimen, Layers):
        plan = eqx.filter_jit(_probes)(model)
    elif isinstance(model.specimen, Beams):
        corner, chunk = np.asarray(corner), np.zeros((1, 1), int) if chunk is None else chunk
        reach = np.ptp(corner[chunk], axis=1).max(axis=0) + (2 if moving else 0)
        plan = Blocks((int(reach[0]), int(reach[1])))
    elif model.optics.source is not None or _moves(moving):
        _require_room(model)
        plan = eqx.filter_jit(_ladder)(model, 6)
    else:
        plan = _tabulate(model, np.asarray(rest, float), per_pixel)
    return eqx.tree_at(lambda m: m.plan, model, plan, is_leaf=lambda x: x is None)


def _moves(names: Sequence[str], of: Sequence[str] = ("optics", "scan", "dose", "stretch")) -> bool:
    """Whether a named leaf changes probes or where they stand."""
    return any(name.split(".")[0] in of for name in names)


def _reach(optics: Optics) -> float:
    """How far states of the source lie beside its centre, Å."""
    if optics.source is None:
        return 0.0
    return float(jnp.max(jnp.abs(source_nodes(optics.source, optics.source_rings)[0])))


def _require_room(model: Scattering) -> None:
    reach, shape = _reach(model.optics), model.specimen.grid.shape
    if reach == 0:
        return
    ends = model.scan.positions.min(axis=0) - reach, model.scan.positions.max(axis=0) + reach
    corner = np.asarray(place(model.specimen, jnp.stack(ends), model.window)[0])
    room = np.asarray(shape) - model.window.shape - corner[1]
    if min(corner[0].min(), room.min()) < 0:
        raise ValueError(
            f"`prepare`: the source moves probes by up to {reach:.3g} Å, so that windows leave the "
            f"specimen's field of {shape} pixels; give the field that much more room on each side, "
            "as `unscattered` does."
        )


def _tabulate(model, rest, per_pixel: int) -> Beamlets:
    levels, entry = [], np.zeros(len(rest), np.int64)
    for axis, step in enumerate(model.window.sampling):
        values, index = spread_levels(rest[:, axis], step, per_pixel)
        levels.append(jnp.asarray(values, model.scan.positions.dtype))
        entry = entry * len(values) + index
    entry = entry * model.dose.shape[0] + np.asarray(model.scan.series)
    y, x = levels
    table = eqx.filter_jit(tabulated)(
        model.optics, model.specimen, model.window, model.halo, model.dose, y, x, model.stretch
    )
    return Beamlets(table, jnp.asarray(entry * model.optics.states, jnp.int32))


def _beam_waves(model: Scattering, specimen: Beams, series, corner, rest):
    weights, states = _beam_weights(model, specimen)[series], model.optics.states
    weights = weights.reshape(-1, weights.shape[-1])
    corner, rest = jnp.repeat(corner, states, axis=0), jnp.repeat(rest, states, axis=0)
    step = jnp.asarray(model.window.sampling, rest.dtype)
    arguments = (specimen, weights, corner, rest)
    if isinstance(model.plan, Blocks) and corner.shape[0] > states:
        low = corner.min(axis=0)
        near = jnp.all(corner.max(axis=0) - low <= jnp.asarray(model.plan.reach, jnp.int32))
        together = partial(_together, model.plan.reach, step)
        waves = jax.lax.cond(near, together, partial(_apart, step), *arguments)
    else:
        waves = _apart(step, *arguments)
    return waves.reshape(-1, states, *waves.shape[1:])


def _beam_weights(model: Scattering, specimen: Beams) -> Complex[Array, "scans states beams"]:
    """Psi_d(h) referred to the specimen's plane, such that the window holds `dose` electrons."""
    h = jnp.asarray(specimen.points, model.dose.dtype)
    h = h if model.stretch is None else h * model.stretch
    travel = math.pi * model.optics.wavelength * specimen.plane * jnp.sum(h**2, axis=1)
    pixels = model.window.shape[0] * model.window.shape[1]
    size = jnp.sqrt(model.dose / (len(h) * pixels))
    wave = pupil(model.optics, h[:, 0], h[:, 1], jnp.ones_like(travel))
    wave = wave * phase_factor(-travel)[None, None]
    return wave * size[:, None, None].astype(wave.dtype)


def _tilted(specimen: Beams, corner, shape):
    """exp(2 pi i h.j) s_h(corner + j): the beams' waves, tilt included, in a window."""
    real = specimen.waves.real.dtype
    ramps = []
    for axis, (count, step) in enumerate(zip(shape, specimen.grid.sampling, strict=True)):
        turns = np.outer(specimen.points[:, axis], step * np.arange(count)) % 1.0
        ramps.append(phase_factor(jnp.asarray(2 * np.pi * turns, real)))
    tilt = ramps[0][:, :, None] * ramps[1][:, None, :]
    return window_of(specimen.waves, corner, shape) * tilt


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
    union = product(weights * _ramp(specimen, centre), waves.reshape(waves.shape[0], -1))
    crop = lambda wave, at: jax.lax.dynamic_slice(wave, (at[0], at[1]), specimen.window.shape)
    return jax.vmap(crop)(union.reshape(-1, *shape), inner)


def _apart(step, specimen: Beams, weights, corner, rest):
    """The slow exact path: every frame sums its own beams."""
    weights = weights * _ramp(specimen, rest + _centre(specimen, step)[None])

    def frame(weights_corner):
        waves = _tilted(specimen, weights_corner[1], specimen.window.shape)
        return jnp.tensordot(weights_corner[0], waves, 1, precision=EXACT)

    return jax.lax.map(frame, (weights, corner))
