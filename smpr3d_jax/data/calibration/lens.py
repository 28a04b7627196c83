"""Rotation, transposition, defoci and aberrations of a series: a search, then an ascent."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Float

from ...physics.optics import CARTESIAN, wavelength
from ..counts import InputError
from .overlap import contrast, explained, Lens, Overlaps


ROTATIONS = 36
SEARCHED = (120, 60)
"""Rotations between 0 and pi, and frequencies and cells, with which a lens is looked for."""
LAYERS = (-0.7, 0.0, 0.7)
"""Depths, in lambda/alpha², of the layers that a focal series tells apart."""


class LensFit(NamedTuple):
    """The lens that fits a series best, and how well the other transposition does.

    `explains` is the part of the power of the bright-field images that the fit holds, `other` what
    the other transposition holds for each part of this one. `sigma` are standard errors of the
    lens, from what it leaves unexplained; of several scans those of C10 and `shift` are relative
    to the mean.
    `sign` is the correlation (-1 to 1) between phase and lost electrons that decides between this
    lens and its opposite, which fits as well (rotation + pi, aberrations and shifts reversed);
    `decided` says by what. `map` has the part explained at each of the search's rotations (rad) and
    defoci (Å), of the first scan.
    """

    lens: Lens
    sigma: Lens
    transpose: bool
    explains: float
    other: float
    sign: float
    decided: str
    map: Float[np.ndarray, "rotations defoci"]
    rotations: Float[np.ndarray, " rotations"]
    defoci: Float[np.ndarray, " defoci"]


def fit_lens(
    data: Overlaps,
    field: float,
    order: int = 1,
    rotation: float | None = None,
    transpose: bool | None = None,
    nominal: Sequence[float] | None = None,
) -> LensFit:
    """Fit rotation, defocus of each scan, and aberrations up to radial `order`, common to all.

    `field` (Å) is the smaller side of the scanned field. `rotation` (rad) and `transpose` are kept
    if given. `nominal` defoci (Å), if any differs from 0, decide the sign; otherwise it is that
    for which phase and electrons lost from the disc go together, as in all matter.
    A series is fitted with three shared layers, so that its scans need not agree on one plane.

    **Raises:** InputError for an `order` outside 1 to 5.
    """
    if not 1 <= order <= 5:
        raise InputError(f"Aberrations are fitted to radial order 1 to 5, not {order}.")
    rotations = np.pi * np.arange(ROTATIONS) / ROTATIONS if rotation is None else [rotation]
    defoci = defocus_grid(data, field)
    maps = {
        turned: _search(data.transposed() if turned else data, np.array(rotations), defoci)
        for turned in ((False, True) if transpose is None else (transpose,))
    }
    merit = {turned: found.max(-1).sum(0) for turned, found in maps.items()}
    chosen = max(merit, key=lambda turned: float(merit[turned].max()))
    best = int(merit[chosen].argmax())
    start = defoci[maps[chosen][:, best].argmax(-1)]
    used = data.transposed() if chosen else data
    scans = len(data.spectra)
    unit = wavelength(data.energy) / (data.cutoff * wavelength(data.energy)) ** 2
    depths = (0.0,) if scans == 1 else tuple(z * unit for z in LAYERS)
    turns, near = rotation is None, float(rotations[best])
    lens, sigma, part = _ascend(used, near, start, order, depths, turns)
    if scans > 1:
        lens = _on_one_plane(lens, used, unit)
    lens, sign, decided = _signed(lens, used, depths, nominal, not turns)
    rivals = [float(m.max() / merit[chosen].max()) for t, m in merit.items() if t != chosen]
    return LensFit(
        lens, sigma, chosen, part, max(rivals, default=0.0), sign, decided, maps[chosen][0],
        np.array(rotations), defoci,
    )  # fmt: skip


def defocus_grid(data: Overlaps, field: float) -> Float[np.ndarray, " defoci"]:
    """Defoci (Å) to be tried: as long as images stay on the `field` (Å), and finely enough.

    A defocus f moves the image of the edge of the disc by alpha f; a step turns the phase of
    nearly all frequencies of the search by no more than a quarter of a turn.
    """
    angle = data.cutoff * wavelength(data.energy)
    q = np.sort(np.hypot(*np.asarray(data.thinned(*SEARCHED).q).T))
    step = 0.25 / (angle * q[int(0.8 * len(q))])
    far = math.ceil(0.6 * field / angle / step)
    return step * np.arange(-far, far + 1.0)


@jax.jit
def _on_grid(data: Overlaps, rotations, defoci):
    """Part of each scan's power explained: (scans, rotations, defoci)."""

    def one(spectra, k):
        alone = eqx.tree_at(lambda o: (o.spectra, o.k), data, (spectra[None], k[None]))
        still = jnp.zeros((1, 2), k.dtype)
        part = lambda t, f: explained(Lens(t, {"C10": -f[None]}, still), alone)
        return jax.lax.map(lambda t: jax.lax.map(lambda f: part(t, f), defoci), rotations)

    return jax.lax.map(lambda both: one(*both), (data.spectra, data.k))


def _search(data: Overlaps, rotations, defoci) -> Float[np.ndarray, "scans rotations defoci"]:
    few = data.thinned(*SEARCHED)
    return np.asarray(_on_grid(few, *(jnp.asarray(a, few.q.dtype) for a in (rotations, defoci))))


class _Coordinates(NamedTuple):
    """How a vector of numbers near 1 stands for a lens; `turns` says whether its rotation moves."""

    names: tuple[str, ...]
    scales: tuple[float, ...]
    scans: int
    turns: bool

    def lens(self, x, rotation) -> Lens:
        """Rotation, defocus of each scan, common aberrations, shifts with a mean of zero."""
        turn, each, common, shift = self._split(x)
        radian, defocus, *scales, length = self.scales
        values = {"C10": each * defocus}
        for name, value, scale in zip(self.names, common, scales, strict=True):
            values[name] = jnp.broadcast_to(value * scale, (self.scans,))
        shift = jnp.concatenate([shift, -jnp.sum(shift, 0, keepdims=True)]) * length
        return Lens(rotation + radian * turn if self.turns else rotation, values, shift)

    def _split(self, x):
        n, end = self.scans, 1 + self.scans + len(self.names)
        return x[0], x[1 : 1 + n], x[1 + n : end], x[end:].reshape(-1, 2)

    def start(self, defoci) -> np.ndarray:
        """No aberration but these defoci (Å)."""
        x = np.zeros(1 + self.scans + len(self.names) + 2 * (self.scans - 1))
        x[1 : 1 + self.scans] = -np.asarray(defoci) / self.scales[1]
        return x


def _coordinates(data: Overlaps, order: int, turns: bool) -> _Coordinates:
    """Aberrations count in radians at the aperture's edge."""
    lam = wavelength(data.energy)
    angle = data.cutoff * lam
    names = tuple(n for n, (radial, _, _) in CARTESIAN.items() if radial <= order and n != "C10")
    radian = lambda n: lam * (n + 1) / (2 * math.pi * angle ** (n + 1))
    scales = [0.02, *(radian(CARTESIAN[n][0]) for n in ("C10", *names)), lam / angle / 6]
    return _Coordinates(names, tuple(scales), len(data.spectra), turns)


@partial(jax.jit, static_argnums=(3, 4))
def _unexplained(x, rotation, data: Overlaps, way: _Coordinates, depths):
    """Part of the power that is left, and its slope."""
    left = lambda x: 1 - explained(way.lens(x, rotation), data, depths)
    return jax.value_and_grad(left)(x)


def _ascend(data: Overlaps, rotation: float, defoci, order: int, depths, turns: bool):
    """The best lens near a start, its standard errors, and the part of the power it explains."""
    way = _coordinates(data, order, turns)
    dtype = data.q.dtype
    turn = jnp.asarray(rotation, dtype)

    def left(x):
        value, slope = _unexplained(jnp.asarray(x, dtype), turn, data, way, depths)
        return float(value), np.asarray(slope, float)

    start = way.start(defoci)
    options = {"maxiter": 100, "gtol": 1e-5}
    found = scipy.optimize.minimize(left, start, jac=True, method="BFGS", options=options)
    step = 0.02
    rows = [
        (left(found.x + step * e)[1] - left(found.x - step * e)[1]) / (2 * step)
        for e in np.eye(len(start))
    ]
    # Of the power left, each of the data that no unknown takes has an equal part: their noise.
    free = data.spectra.size - 2 * len(data.q) * len(depths)
    curvature = (np.array(rows) + np.array(rows).T) / 2 * free / max(float(found.fun), 1e-12)
    kept = slice(0 if turns else 1, None)
    covariance = np.zeros_like(curvature)
    size, axes = np.linalg.eigh(curvature[kept, kept])
    # Rounding must not make a direction certain that the data leave open.
    covariance[kept, kept] = axes / np.maximum(size, 1e-4 * size[-1]) @ axes.T
    at = jnp.asarray(found.x, dtype)
    free = lambda x: _about_mean(way.lens(x, turn))
    return way.lens(at, turn), _errors(free, at, covariance), 1 - float(found.fun)


def _about_mean(lens: Lens) -> Lens:
    """The defoci of several scans relative to each other: the common one is a matter of layers."""
    c10 = lens.aberrations["C10"]
    common = jnp.mean(c10) if len(c10) > 1 else 0.0
    return Lens(lens.rotation, lens.aberrations | {"C10": c10 - common}, lens.shift)


def _errors(lens: Callable[[Any], Lens], at, covariance) -> Lens:
    """Standard error of every number of a lens that depends on coordinates linearly."""
    _, build = jax.flatten_util.ravel_pytree(lens(at))
    rows = jax.jacobian(lambda x: jax.flatten_util.ravel_pytree(lens(x))[0])(at)
    variance = np.einsum("ij,jk,ik->i", rows, covariance, rows)
    return build(jnp.asarray(np.sqrt(np.clip(variance, 0, None)), at.dtype))


def _on_one_plane(lens: Lens, data: Overlaps, unit: float) -> Lens:
    """With the middle of the planes that explain most at zero: layers and scans may move together.

    The mean over the planes within 1.5 lambda/alpha², weighted by the square of what a single layer
    explains beyond the least.
    """
    middle = 0.0
    for _ in range(3):
        tried = middle + 1.5 * unit * np.linspace(-1, 1, 25)
        part = np.asarray(_by_one_layer(lens, data, jnp.asarray(tried, data.q.dtype)), float)
        weight = (part - part.min()) ** 2
        middle = float(np.sum(weight * tried) / np.sum(weight))
    c10 = {"C10": lens.aberrations["C10"] + jnp.asarray(middle, data.q.dtype)}
    return Lens(lens.rotation, lens.aberrations | c10, lens.shift)


@jax.jit
def _by_one_layer(lens: Lens, data: Overlaps, offsets):
    def part(offset):
        c10 = {"C10": lens.aberrations["C10"] + offset}
        return explained(Lens(lens.rotation, lens.aberrations | c10, lens.shift), data)

    return jax.lax.map(part, offsets)


def _signed(lens: Lens, data: Overlaps, depths, nominal, known: bool):
    """This lens or its opposite, with the correlation of phase and lost electrons."""
    phase, amplitude = contrast(lens, data, depths)
    phase, lost = jnp.sum(phase, -1), -jnp.sum(amplitude, -1)
    power = jnp.sqrt(jnp.sum(jnp.abs(phase) ** 2) * jnp.sum(jnp.abs(lost) ** 2))
    sign = float(jnp.sum(jnp.real(phase * lost.conj())) / power)
    if known:
        return lens, sign, "the rotation given"
    given = np.asarray(nominal if nominal is not None else [0.0], float)
    found = -np.asarray(lens.aberrations["C10"], float)
    if np.any(given != 0):
        right, decided = float(np.sum(given * found)) >= 0, "the nominal defocus"
    else:
        right, decided = sign >= 0, "phase and lost electrons"
    if right:
        return lens, sign, decided
    opposite = {name: -value for name, value in lens.aberrations.items()}
    turned = lens.rotation + math.pi
    return Lens(turned, opposite, -lens.shift), -sign, decided
