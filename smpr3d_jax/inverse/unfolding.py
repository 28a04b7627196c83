"""Images at the points of a finer raster, at many depths, from the pixels of the bright field.

A raster of finite step folds frequencies beyond its Nyquist frequency onto those within. Pixels
disagree about them, each in its own way, so that the folded frequencies Q_j are told apart by least
squares: sum_l A_jl x_l = b_j with A_jl = sum_k conj w_j(k) h_l(k), b_j = sum_k conj w_j(k) G(k),
h the model of a pixel's spectrum G and w = h, but for the plain single-sideband sum. Pixels are
taken in blocks that stay in cache, and all depths share the transform of each.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, Num

from ..data.counts import InputError
from ..physics.fourier import phase_factor
from ..physics.optics import aberration_shift, Optics
from .brightfield import BrightField, fraction_inside, refocused, sidebands, Waves
from .rasters import Raster


IN_CACHE = 2**17
"""Frequencies times pixels that a block holds."""


Weigh = Callable[[Waves], tuple[Complex[Array, "*shape"], Complex[Array, "*shape"]]]
"""From the waves of some pixels to the weight w of each and the model h that its image obeys."""


class Normal(NamedTuple):
    """The normal equations of every frequency and depth, and the phase's transfer to `vector`."""

    matrix: Complex[Array, "depths folds folds slow half"]
    vector: Complex[Array, "depths folds slow half"]
    transfer: Complex[Array, "depths folds slow half"]


class Folding(NamedTuple):
    """The frequencies that a raster of finite step cannot tell apart, `factor`² at each of its own.

    `turns`: cycles per step along the slow and the fast axis; `q` (y, x) in 1/Å. `source` says
    where each frequency of the finer raster is found in them, `mirrored` whether at its opposite.
    """

    slow: Float[np.ndarray, "folds slow"]
    fast: Float[np.ndarray, "folds half"]
    q: Float[np.ndarray, "2 folds slow half"]
    source: Int[np.ndarray, "fine finehalf"]
    mirrored: Num[np.ndarray, "fine finehalf"]


def folding(raster: Raster, factor: int) -> Folding:
    """Frequencies of a raster `factor` times finer, sorted by those of `raster` they fold onto."""
    n, m = raster.shape
    fine = (n * factor, m * factor)
    start = [np.arange(n), np.arange(m // 2 + 1)]
    orders = [
        (o[None] + size * np.arange(factor)[:, None] + f // 2) % f - f // 2
        for o, size, f in zip(start, raster.shape, fine, strict=True)
    ]
    slow, fast = np.repeat(orders[0], factor, axis=0), np.tile(orders[1], (factor, 1))
    turns = np.stack(np.broadcast_arrays(slow[:, :, None] / n, fast[:, None, :] / m))
    q = np.einsum("ljsf,la->ajsf", turns, np.linalg.inv(raster.lattice).T)
    number = np.arange(q[0].size).reshape(q.shape[1:])
    rows, columns = np.broadcast_arrays(slow[:, :, None], fast[:, None, :])
    source, mirrored = np.zeros(fine, int), np.ones(fine, bool)
    source[-rows % fine[0], -columns % fine[1]] = number
    source[rows % fine[0], columns % fine[1]] = number
    mirrored[rows % fine[0], columns % fine[1]] = False
    half = fine[1] // 2 + 1
    return Folding(slow / n, fast / m, q, source[:, :half], mirrored[:, :half])


def normal_equations(
    bright: BrightField,
    depths: Float[Array, " depths"],
    weigh: Weigh,
    factor: int,
    wide: Raster,
) -> Normal:
    """Sum the pixels' equations, block after block; each image is transformed once for all depths.

    `wide` is the raster with its margin, `factor` how many times finer the image is to be.
    """
    fold, lens = folding(wide, factor), bright.optics
    inside = fraction_inside(jnp.hypot(*bright.k.T), lens.cutoff, bright.pixel)
    size, real = max(1, IN_CACHE // fold.q[0].size), bright.k.dtype
    fill = -len(bright.k) % size
    # Pixels far outside the disc fill up the last block.
    k = jnp.pad(bright.k, ((0, fill), (0, 0)), constant_values=1e3 * lens.cutoff)
    images = jnp.pad(bright.images, ((0, fill), (0, 0), (0, 0)))
    blocks = [a.reshape(-1, size, *a.shape[1:]) for a in (images, k)]
    # What differs between scans goes in as numbers, so that no scan is compiled for itself.
    given = (fold.q, fold.slow, fold.fast, np.linalg.inv(bright.raster.lattice).T, bright.pixel)
    numbers = [jnp.asarray(a, real) for a in given]
    sums = _summed(blocks, bright.level, lens, depths.astype(real), numbers, weigh, wide.shape)
    return jax.tree.map(lambda a: a / jnp.sum(inside**2).astype(a.dtype), sums)


@eqx.filter_jit
def _summed(blocks, level, lens: Optics, depths, numbers, weigh: Weigh, outer: tuple[int, int]):
    q, slow, fast, reciprocal, width = numbers
    square, lam = jnp.sum(q**2, axis=0), lens.wavelength
    frame = _frame(blocks[0].shape[2:], outer, q.dtype)

    def add(total, block):
        images, k = block
        spectra = _spectra(images, level, frame)[:, None]
        waves = jax.lax.optimization_barrier(sidebands(lens, width, k, q))
        steps = jnp.sum(k[:, None, :] * reciprocal[None], axis=-1)[:, :, None, None]
        tilt = (steps[:, 0] * slow[None], steps[:, 1] * fast[None])

        def at(depth):
            there = refocused(waves, depth, lam, square, tilt)
            # Materialised, for else each sum computes them again.
            weight, model, gamma = jax.lax.optimization_barrier(
                (*weigh(there), 1j * (there.left - there.right))
            )
            weight = jnp.conj(weight)
            return Normal(
                jnp.sum(weight[:, :, None] * model[:, None], axis=0),
                jnp.sum(weight * spectra, axis=0),
                jnp.sum(weight * gamma, axis=0),
            )

        return jax.tree.map(jnp.add, total, jax.lax.map(at, depths)), None

    folds = q.shape[1]
    zeros = lambda *some: jnp.zeros((len(depths), *some, *q.shape[2:]), phase_factor(width).dtype)
    start = Normal(zeros(folds, folds), zeros(folds), zeros(folds))
    return jax.lax.scan(add, start, blocks)[0]


def _frame(inner: tuple[int, int], outer: tuple[int, int], dtype):
    """How to continue an image into its margin, and by what it fades out there."""
    pads, tapers = [], []
    for n, m in zip(inner, outer, strict=True):
        before = (m - n) // 2
        pads.append((before, m - n - before))
        edge = lambda p: np.sin(np.pi / 2 * (np.arange(p) + 0.5) / max(p, 1)) ** 2
        tapers.append(np.concatenate([edge(before), np.ones(n), edge(m - n - before)[::-1]]))
    return pads, jnp.asarray(np.outer(*tapers), dtype)


def _spectra(images, level, frame) -> Complex[Array, "pixels slow half"]:
    """Transforms of a block of images in units of the disc's level, without their means."""
    pads, taper = frame
    values = images.astype(taper.dtype) / level
    values = values - jnp.mean(values, axis=(1, 2), keepdims=True)
    return jnp.fft.rfft2(jnp.pad(values, [(0, 0), *pads], mode="symmetric") * taper[None])


Depths = Sequence[float | int] | Float[np.ndarray, " depths"] | Float[Array, " depths"]


class Focused(NamedTuple):
    """Images (z, slow, fast) of a specimen at `depths` (Å), and the raster of their points."""

    images: Float[Array, "depths slow fast"]
    depths: Float[Array, " depths"]
    raster: Raster


def margins(bright: BrightField, depths: Float[Array, " depths"]) -> tuple[int, int]:
    """Positions by which the disc's images move against each other at most, and two more."""
    lens, far = bright.optics, bright.k[jnp.argsort(jnp.sum(bright.k**2, axis=1))[-64:]]
    moved = aberration_shift(lens.aberrations, far[:, 0], far[:, 1], lens.energy)[0]
    tilt = far * lens.wavelength
    reach = max(float(jnp.abs(moved + z * tilt).max()) for z in depths)
    most = (
        min(n, math.ceil(reach / d) + 2)
        for n, d in zip(bright.raster.shape, bright.raster.step, strict=True)
    )
    slow, fast = most
    return slow, fast


def prepared(name: str, bright: BrightField, depths: Depths, upsample: int, epsilon: float, margin):
    """The depths as an array and the raster with its margin, or InputError."""
    if len(depths) == 0 or upsample < 1 or not epsilon > 0:
        raise InputError(
            f"`{name}` needs at least one depth, `upsample` of 1 or more and `epsilon` above 0; "
            f"got {len(depths)} depths, {upsample} and {epsilon}."
        )
    planes = jnp.asarray(np.asarray(depths, float), bright.k.dtype)
    margin = margins(bright, planes) if margin is None else margin
    return planes, bright.raster if max(margin) == 0 else bright.raster.wider(margin)


def image(
    spectrum: Complex[Array, "depths folds slow half"],
    depths: Float[Array, " depths"],
    bright: BrightField,
    wide: Raster,
    factor: int,
) -> Focused:
    """Unfold the frequencies, transform them back, and cut the margin off."""
    fold, fine = folding(wide, factor), bright.raster.finer(factor)
    flat = spectrum.reshape(len(depths), -1)[:, jnp.asarray(fold.source)]
    whole = jnp.where(jnp.asarray(fold.mirrored)[None], jnp.conj(flat), flat)
    images = jnp.fft.irfft2(whole, (wide.shape[0] * factor, wide.shape[1] * factor)) * factor**2
    y, x = ((m - n) // 2 * factor for n, m in zip(bright.raster.shape, wide.shape, strict=True))
    return Focused(images[:, y : y + fine.shape[0], x : x + fine.shape[1]], depths, fine)


def solved(sums: Normal, epsilon: float) -> Complex[Array, "depths folds slow half"]:
    """x of (A + epsilon) x = b for every frequency and depth."""
    if sums.vector.shape[1] == 1:
        return sums.vector / (sums.matrix[:, :, 0] + epsilon)
    matrix, vector = jnp.moveaxis(sums.matrix, (1, 2), (-2, -1)), jnp.moveaxis(sums.vector, 1, -1)
    matrix = matrix + epsilon * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None, None, None]
    return jnp.moveaxis(jnp.linalg.solve(matrix, vector[..., None])[..., 0], -1, 1)
