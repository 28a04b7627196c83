"""What about the microscope may be refined: which leaves of the model move, along what, how fast.

A parameter is a linear map `spread` from its coordinates, in its unit, to changes of leaves of the
model: turning a raster is one coordinate of all positions, an aberration common to all scans one
coordinate of as many numbers. What the data cannot determine (`held`) is left out of the map.
`scale` is how much of the unit turns the phase at the edge of the aperture by about 1 rad,
lambda (n+1)/(2 pi alpha^(n+1)) for an aberration of order n, so that all parameters are moved in
comparable steps.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ..data.counts import compare
from ..data.dataset import Dataset
from ..physics.forward import Scattering
from ..physics.fourier import EXACT
from ..physics.layers import Layers
from ..physics.optics import CARTESIAN
from ..physics.ptychography import ObjectSlices
from .batches import each
from .losses import figures_of_merit, Noise
from .updates import named_leaves


OF_FRAMES = ("scan.positions", "exposure")
"""Leaves of which each frame has its own entry."""

Changes = dict[str, Array]
"""How leaves change, by the path of each (`optics.aberrations.C10`)."""


class Parameter(NamedTuple):
    """One thing to refine: the `shape` of its coordinates, and what they change.

    `sigma` is the standard deviation, in the unit, of a normal prior about the start; None: none.
    `start` is the parameter's value there, `about_mean` whether only differences matter.
    """

    name: str
    about: str
    unit: str
    scale: float
    shape: tuple[int, ...]
    spread: Callable[[Array], Changes]
    held: str = "nothing"
    sigma: float | None = None
    start: float | Float[np.ndarray, "*shape"] = 0.0
    about_mean: bool = False

    def value(self, coordinates: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The parameter where its coordinates are `coordinates`."""
        if self.about_mean:
            coordinates = coordinates - np.mean(coordinates, axis=0)
        # A sum of arrays without axes would be a number.
        return np.asarray(self.start + coordinates, float)

    @property
    def of_frames(self) -> bool:
        """Whether each frame has its own."""
        return self.name in ("positions", "exposure")

    def leaves(self, dtype: jax.typing.DTypeLike = np.float32) -> tuple[str, ...]:
        """The leaves that move."""
        return tuple(jax.eval_shape(self.spread, jax.ShapeDtypeStruct(self.shape, dtype)))


def refine(
    model: Scattering, names: Sequence[str], nominal: Float[np.ndarray, "frames 2"] | None = None
) -> tuple[Scattering, tuple[Parameter, ...]]:
    """The model with every leaf that `names` need, and the parameters themselves.

    Known names are those of `KNOWN`: `positions`, `shift`, `rotation`, `affine`, `defocus`, an
    aberration such as `C12` common to all scans, or `C12_per_scan`, `dose`, `exposure`,
    `camera_length`, `source_size`, `defocus_spread`, `background`, `blur`, `tilt` and `depths`.
    `nominal` positions (default: the model's) are those that rasters turn and stretch.

    **Raises:** ValueError for a name that is not known, named twice, or that this model's data
    cannot determine.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"`refine`: {list(names)} names a parameter twice.")
    found: list[Parameter] = []
    for name in names:
        model = _completed(model, name)
        found += _parameters(model, name, nominal)
    return model, tuple(found)


def joint(
    parameters: Sequence[Parameter],
    optimiser: Callable[[Parameter], optax.GradientTransformation],
    frames: int,
) -> optax.GradientTransformationExtraArgs:
    """Moves the coordinates of all parameters, each by its own `optimiser`, in units of its scale.

    For leaves of the model together (see `moving_leaves`); in a step in which some of them rest,
    so do the parameters that need them. The state keeps the coordinates, in the
    parameters' units, from the start. Priors are weighed for a loss that is a mean over `frames`.
    """
    inner = {p.name: optax.with_extra_args_support(optimiser(p)) for p in parameters}

    def init(params):
        real = jnp.finfo(jax.tree.leaves(params)[0].dtype).dtype
        start = {p.name: jnp.zeros(p.shape, real) for p in parameters}
        return Joint({name: inner[name].init(c) for name, c in start.items()}, start)

    def update(updates, state, params=None, **_):
        slopes = named_leaves(updates)
        # Not by `tree.map`, which would sort the names.
        total = {leaf: jnp.zeros_like(slope) for leaf, slope in slopes.items()}
        kept, coordinates = {}, {}
        for p in parameters:
            at = state.coordinates[p.name]
            if not set(p.leaves(at.dtype)) <= set(slopes):  # a leaf of it rests
                kept[p.name], coordinates[p.name] = state.inner[p.name], at
                continue
            own = {leaf: slopes[leaf].astype(at.dtype) for leaf in p.leaves(at.dtype)}
            (slope,) = jax.linear_transpose(p.spread, at)(own)
            if p.sigma is not None:
                slope = slope + at / (frames * p.sigma**2)
            step, kept[p.name] = inner[p.name].update(
                slope * p.scale, state.inner[p.name], at / p.scale
            )
            move = jnp.asarray(step) * p.scale
            coordinates[p.name] = at + move
            for leaf, change in p.spread(move).items():
                total[leaf] = total[leaf] + change.astype(total[leaf].dtype)
        moved = jax.tree.unflatten(jax.tree.structure(updates), list(total.values()))
        return moved, Joint(kept, coordinates)

    return optax.GradientTransformationExtraArgs(init, update)


class Joint(NamedTuple):
    """State of `joint`: each optimiser's, and how far each parameter is from its start."""

    inner: dict[str, Any]
    coordinates: dict[str, Array]


def coordinates(state: Any) -> dict[str, Float[np.ndarray, "..."]]:
    """How far each parameter is from its start, found anywhere in the state of an optimiser."""
    parts = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Joint))
    found = [part.coordinates for part in parts if isinstance(part, Joint)]
    return {name: np.asarray(c) for each in found for name, c in each.items()}


def look_around(
    model: Scattering,
    state: Any,
    data: Dataset,
    noise: Noise,
    positions: Parameter,
    share: float = 0.1,
    reach: float = 4.0,
    chunk: int = 64,
) -> tuple[Scattering, Any, int]:
    """Try other places for the frames that fit worst, since a gradient does not leave its valley.

    The `share` of frames of each scan that differ most from the model, beyond what noise explains,
    are compared with it at 81 offsets up to `reach` standard deviations of the prior, which is
    counted too; those that fit better elsewhere are put there. Returns model, state, and how many
    were moved.
    """
    sigma, offset = positions.sigma or positions.scale, coordinates(state)["positions"]
    start = np.asarray(model.scan.positions) - offset + offset.mean(axis=0)[None]
    excess = each(_excess, model, data, np.arange(len(data)), chunk)
    series, misfits = np.asarray(data.scan.series), partial(_misfit, noise)
    bad = [_largest(excess, np.flatnonzero(series == s), share) for s in np.unique(series)]
    frames = np.sort(np.concatenate(bad))
    best = each(misfits, model, data, frames, chunk)
    best = best + np.sum(offset[frames] ** 2, axis=1) / (2 * sigma**2)
    found = offset[frames].copy()
    for place in np.ndindex(9, 9):
        there = (np.asarray(place) - 4) * reach * sigma / 4
        moved = model.scan.positions.at[frames].set(
            jnp.asarray(start[frames] - offset.mean(axis=0) + there, start.dtype)
        )
        tried = eqx.tree_at(lambda m: m.scan.positions, model, moved)
        cost = each(misfits, tried, data, frames, chunk) + np.sum(there**2) / (2 * sigma**2)
        found = np.where((cost < best)[:, None], there, found)
        best = np.minimum(cost, best)
    changed = frames[np.any(found != offset[frames], axis=1)]
    offset = offset.copy()
    offset[frames] = found
    moved = jnp.asarray(start - offset.mean(axis=0) + offset, model.scan.positions.dtype)
    model = eqx.tree_at(lambda m: m.scan.positions, model, moved)
    return model, _placed(state, "positions", offset, changed), len(changed)


def _largest(values, among, share: float):
    """Those of `among` with the largest `values`."""
    return among[np.argsort(-values[among])][: math.ceil(share * len(among))]


@eqx.filter_jit
def _misfit(noise, model, frames):
    return compare(noise, model(frames.index), frames.counts, frames.mask)


@eqx.filter_jit
def _excess(model, frames):
    """How much more frames differ from the model than by noise, in standard deviations or so."""
    merits = figures_of_merit(model, frames)
    return (merits["deviance"] - merits["noise"]) / jnp.sqrt(merits["noise"])


def _placed(state, name: str, coordinates, changed):
    """The state with other coordinates, and without memory where they were changed."""

    def forget(leaf):
        same = eqx.is_array(leaf) and leaf.shape == coordinates.shape
        return leaf.at[changed].set(0) if same else leaf

    def placed(node):
        if not isinstance(node, Joint):
            return node
        inner = node.inner | {name: jax.tree.map(forget, node.inner[name])}
        at = jnp.asarray(coordinates, node.coordinates[name].dtype)
        return Joint(inner, node.coordinates | {name: at})

    return jax.tree.map(placed, state, is_leaf=lambda node: isinstance(node, Joint))


def moving_leaves(parameters: Sequence[Parameter]) -> tuple[str, ...]:
    """Names of the leaves that the parameters move, as `per_leaf` and `prepare` want them."""
    return tuple(dict.fromkeys(leaf for p in parameters for leaf in p.leaves()))


def directions(model: Scattering, parameters: Sequence[Parameter]) -> dict[str, PyTree]:
    """A unit change of every coordinate of few-numbered parameters, shaped as the model.

    Coordinates are numbered, `defocus[2]`, where there are several; what they change is in the
    parameter's unit.
    """
    zero = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if eqx.is_inexact_array(leaf) else None, model
    )
    result = {}
    for p in parameters:
        for place in np.ndindex(p.shape):
            unit = jnp.zeros(p.shape).at[place].set(1)
            label = p.name + (f"[{', '.join(map(str, place))}]" if place else "")
            result[label] = _changed(zero, p.spread(unit))
    return result


def _changed(tree: PyTree, changes: Changes) -> PyTree:
    leaves = named_leaves(tree)
    new = [changes.get(path, leaf) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def _completed(model: Scattering, name: str) -> Scattering:
    """The model with the leaves that a parameter needs and the model lacks."""
    real, none = model.dose.dtype, lambda x: x is None
    if name == "exposure" and model.exposure is None:
        ones = jnp.ones(model.scan.series.shape, real)
        return eqx.tree_at(lambda m: m.exposure, model, ones, is_leaf=none)
    if name == "camera_length" and model.stretch is None:
        return eqx.tree_at(lambda m: m.stretch, model, jnp.ones((), real), is_leaf=none)
    missing = {
        leaf: jnp.zeros_like(model.dose)
        for leaf in (term.leaf for part in _parts(name) for term in _terms(part, 1.0))
        if leaf in CARTESIAN and leaf not in model.optics.aberrations
    }
    if not missing:
        return model
    return eqx.tree_at(lambda m: m.optics.aberrations, model, model.optics.aberrations | missing)


def _parameters(model: Scattering, name: str, nominal) -> list[Parameter]:
    if _parts(name):
        return _aberrations(model, name)
    if name not in KNOWN:
        near = difflib.get_close_matches(name, REFINABLE, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`refine`: {name!r} cannot be refined.{hint} Known: {REFINABLE}.")
    lens = model.optics
    room = _Room(
        model,
        np.asarray(model.scan.positions if nominal is None else nominal, float),
        lens.wavelength / (2 * math.pi * lens.semiangle * 1e-3),
        lens.wavelength / (math.pi * (lens.semiangle * 1e-3) ** 2),
    )
    return [KNOWN[name](room)]


class _Room(NamedTuple):
    """What scales are made of: `across` and `along` (Å) turn the aperture's edge by 1 rad."""

    model: Scattering
    nominal: Float[np.ndarray, "frames 2"]
    across: float
    along: float

    @property
    def centred(self) -> Float[np.ndarray, "frames 2"]:
        """Nominal positions from the middle of the scan."""
        return self.nominal - (self.nominal.min(axis=0) + self.nominal.max(axis=0)) / 2

    @property
    def scans(self) -> int:
        return self.model.dose.shape[0]

    def required(self, leaf: Array | None, name: str, remedy: str) -> float:
        """The value of an optional leaf, which must be there to be refined."""
        if leaf is None:
            raise ValueError(f"`refine`: {name!r} needs a model that has it: {remedy}.")
        return float(leaf)

    def layers(self, name: str) -> Layers | ObjectSlices:
        specimen = self.model.specimen
        if not isinstance(specimen, Layers | ObjectSlices):
            raise ValueError(
                f"`refine`: {name!r} cannot be refined with an S-matrix, which absorbs any of it; "
                "it can with layers."
            )
        if isinstance(specimen, ObjectSlices) and len(specimen.depths) == 1:
            raise ValueError(
                f"`refine`: {name!r} of a single slice changes no frame; take it out, or use more."
            )
        return specimen


def _positions(room: _Room) -> Parameter:
    step = _spacing(room.nominal, np.asarray(room.model.scan.series))
    return Parameter(
        "positions", "offset of every probe position", "Å", room.across, room.nominal.shape,
        lambda c: {"scan.positions": c - jnp.mean(c, axis=0)[None]},
        "the mean, which is where the specimen lies", step, about_mean=True,
    )  # fmt: skip


def _spacing(positions, series) -> float:
    """The side of the square that each position of a scan owns, Å."""
    own = positions[series == series[0]]
    spread = np.maximum(np.ptp(own, axis=0), 1e-3)
    return float(np.sqrt(spread.prod() / len(own)))


def _shift(room: _Room) -> Parameter:
    series = room.model.scan.series
    return Parameter(
        "shift", "drift of each scan against the others", "Å", room.across, (room.scans, 2),
        lambda c: {"scan.positions": (c - jnp.mean(c, axis=0)[None])[series]},
        "the mean, which is where the specimen lies", about_mean=True,
    )  # fmt: skip


def _rotation(room: _Room) -> Parameter:
    turned = np.deg2rad(room.centred[:, ::-1] * [1, -1])
    radius = np.sqrt(np.mean(turned**2) * 2)
    return Parameter(
        "rotation", "angle of the scan against the detector", "deg", room.across / radius, (),
        lambda c: {"scan.positions": c * jnp.asarray(turned, c.dtype)},
    )  # fmt: skip


def _affine(room: _Room) -> Parameter:
    radius = np.sqrt(np.mean(room.centred**2) * 2)
    return Parameter(
        "affine", "scale, shear and angle of the raster: (y, x) by (y, x)", "1",
        room.across / radius, (2, 2),
        lambda c: {"scan.positions": jnp.einsum(
            "fj,ij->fi", jnp.asarray(room.centred, c.dtype), c, precision=EXACT
        )},
    )  # fmt: skip


def _camera_length(room: _Room) -> Parameter:
    radius = np.sqrt(np.mean(room.centred**2) * 2)
    return Parameter(
        "camera_length", "true over nominal angle of a detector pixel, less 1", "1",
        min(room.across / radius, 0.01), (), lambda c: {"stretch": c},
        "the aperture's semi-angle and the scan step, which it is measured by",
    )  # fmt: skip


def _dose(room: _Room) -> Parameter:
    start = np.asarray(room.model.dose)
    return Parameter(
        "dose", "electrons per frame of each scan, relative to the start", "1", 0.05,
        (room.scans,), lambda c: {"dose": c * jnp.asarray(start, c.dtype)}, start=1.0,
    )  # fmt: skip


def _exposure(room: _Room) -> Parameter:
    return Parameter(
        "exposure", "electrons of each frame, relative to its scan's dose", "1", 0.05,
        room.nominal.shape[:1], lambda c: {"exposure": c - jnp.mean(c)}, "the mean", 0.1,
        1.0, True,
    )  # fmt: skip


def _source_size(room: _Room) -> Parameter:
    lens = room.model.optics
    start = room.required(lens.source, "source_size", "give `focal_series` a `source`")
    return Parameter(
        "source_size", "rms size of the source", "Å", room.across, (),
        lambda c: {"optics.source": c}, start=start,
    )  # fmt: skip


def _defocus_spread(room: _Room) -> Parameter:
    lens = room.model.optics
    start = room.required(lens.spread, "defocus_spread", "give `focal_series` a `spread`")
    return Parameter(
        "defocus_spread", "rms spread of the defocus", "Å", room.along, (),
        lambda c: {"optics.spread": c}, start=start,
    )  # fmt: skip


def _background(room: _Room) -> Parameter:
    camera = room.model.detector
    start = room.required(camera.background, "background", "give `Detector` a `background`")
    pixels = math.prod(room.model.detector.shape)
    return Parameter(
        "background", "electrons per pixel and frame that are not the beam's", "electrons",
        0.01 * float(room.model.dose.mean()) / pixels, (), lambda c: {"detector.background": c},
        start=start,
    )  # fmt: skip


def _blur(room: _Room) -> Parameter:
    start = room.required(room.model.detector.blur, "blur", "give `Detector` a `blur`")
    return Parameter(
        "blur", "rms point spread of the camera", "pixels", 0.2, (),
        lambda c: {"detector.blur": c}, start=start,
    )  # fmt: skip


def _tilt(room: _Room) -> Parameter:
    depths = np.asarray(room.layers("tilt").depths)
    return Parameter(
        "tilt", "tilt of the specimen (y, x)", "mrad",
        1e3 * room.across / max(float(np.ptp(depths)), room.along), (2,),
        lambda c: {"specimen.tilt": c},
        "what layers shifted sideways, each by its depth, explain as well",
    )  # fmt: skip


def _depths(room: _Room) -> Parameter:
    return Parameter(
        "depths", "depth of each layer", "Å", room.along, room.layers("depths").depths.shape,
        lambda c: {"specimen.depths": c - jnp.mean(c)},
        "the mean, which moves with all defoci",
        start=np.asarray(room.layers("depths").depths, float), about_mean=True,
    )  # fmt: skip


KNOWN: dict[str, Callable[[_Room], Parameter]] = {
    "positions": _positions, "shift": _shift, "rotation": _rotation, "affine": _affine,
    "camera_length": _camera_length, "dose": _dose, "exposure": _exposure,
    "source_size": _source_size, "defocus_spread": _defocus_spread, "background": _background,
    "blur": _blur, "tilt": _tilt, "depths": _depths,
}  # fmt: skip
"""Parameters beside the aberrations."""


REFINABLE: tuple[str, ...] = (
    *KNOWN, "defocus",
    *(f"C{n}{m}{which}" for n, m in sorted({v[:2] for v in CARTESIAN.values()})[1:]
      for which in ("", "_per_scan")),
)  # fmt: skip
"""Every name that `refine` takes."""


class _Term(NamedTuple):
    leaf: str
    factor: float


def _parts(name: str) -> list[str]:
    """Cartesian coefficients of a refinable aberration, none for any other name."""
    base = "C10" if name == "defocus" else name.removesuffix("_per_scan")
    return [part for part in (base, f"{base}a", f"{base}b") if part in CARTESIAN and name != "C10"]


def _terms(part: str, alpha: float) -> list[_Term]:
    """An aberration with the lower ones that make it orthogonal to them over the aperture.

    Its Zernike polynomial with the leading coefficient 1. So the third order moves no layer in
    depth, and coma no layer sideways, while they are refined: the common defocus and the mean
    position carry the rest of the polynomial.
    """
    n, m, end = CARTESIAN[part]
    order, terms, f = n + 1, [_Term(part, 1.0)], math.factorial
    lead = f(order) / (f((order + m) // 2) * f((order - m) // 2))
    for j in range(1, (order - m) // 2 + 1):
        low = order - 2 * j
        if low == 0:
            break
        share = (
            (-1) ** j * f(order - j) / (f(j) * f((order + m) // 2 - j) * f((order - m) // 2 - j))
        )
        leaf = f"C{low - 1}{m}{end}" if low > 1 else f"shift_{end}"
        terms.append(_Term(leaf, share / lead * low / order * alpha ** (2 * j)))
    return terms


def _aberrations(model: Scattering, name: str) -> list[Parameter]:
    scans, series, lens = model.dose.shape[0], model.scan.series, model.optics
    each, alpha = name.endswith("_per_scan") or name == "defocus", lens.semiangle * 1e-3
    if name == "defocus" and scans == 1:
        raise ValueError(
            "`refine`: 'defocus' of a single scan is where the specimen lies in depth, which is "
            "not to be known from the data; leave it out."
        )

    def parameter(part: str) -> Parameter:
        n, m, end = CARTESIAN[part]
        scale = lens.wavelength * (n + 1) / (2 * math.pi * alpha ** (n + 1))

        def spread(c):
            own = (jnp.mean(c) - c) if name == "defocus" else jnp.broadcast_to(c, (scans,))
            changes = {}
            for leaf, factor in _terms(part, alpha):
                if leaf in CARTESIAN:
                    changes[f"optics.aberrations.{leaf}"] = factor * own
                else:
                    axis = jnp.asarray([leaf == "shift_b", leaf == "shift_a"], c.dtype)
                    changes["scan.positions"] = (factor * own)[series][:, None] * axis[None]
            return changes

        held = "nothing but by the depth range of S"
        if name == "defocus":
            held = "the mean, which is where the specimen lies in depth"
        label = name if name == "defocus" else name.replace(f"C{n}{m}", part)
        about = "defocus" if name == "defocus" else f"aberration {part}"
        about += " of each scan" if each else " common to all scans"
        start = np.asarray(lens.aberrations[part], float)
        start = -start if name == "defocus" else start if each else start.mean()
        shape = (scans,) if each else ()
        return Parameter(
            label, about, "Å", scale, shape, spread, held, None, start, name == "defocus"
        )

    return [parameter(part) for part in _parts(name)]
