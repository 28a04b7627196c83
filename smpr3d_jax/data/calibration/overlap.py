"""Rotation, defocus and aberrations from how the cells of the bright-field disc agree.

To first order in what a specimen scatters, the image of the detector point k, Fourier transformed
over the scan, is at the spatial frequency q

    g(k, q) = A*(k) A(k - q) o(q) + A(k) A*(k + q) o*(-q),      A = aperture · exp(-i chi),

for a layer in the plane of the focus (J. M. Rodenburg, B. C. McCallum, P. D. Nellist, 1993,
Ultramicroscopy 48, 304); a layer at depth z sees C10 + z. The two unknowns of each q, o(q) and
o*(-q), are complex and not related to each other, so amplitude contrast does no harm. What of the
data lies in the space that these columns span is a function of lens and rotation alone: its
maximum is the least-squares fit of all of them. Defocus moves the images, which this model
contains, and unlike the alignment of images it works in focus too.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from ...physics.fourier import phase_factor
from ...physics.optics import aberration_phase, wavelength
from ..counts import InputError
from .signals import Signals


STRONGEST = 300
"""Frequencies of the scan that are fitted, the strongest ones."""
RIDGE = 1e-3
"""What the unknowns are damped by, as part of the power that a whole disc would give them."""


class Overlaps(eqx.Module):
    """Spectra of the bright-field images of a series, in units of the noise of their counts.

    `q` (1/Å, in the raster's axes), `k` (1/Å) of each scan's cells, and `width`, that of a cell.
    """

    spectra: Complex[Array, "scans q k"]
    q: Float[Array, "q 2"]
    k: Float[Array, "scans k 2"]
    energy: float = eqx.field(static=True)
    cutoff: float = eqx.field(static=True)
    width: float = eqx.field(static=True)

    @property
    def cells(self) -> int:
        """Of all scans."""
        return self.spectra.shape[0] * self.spectra.shape[2]

    def thinned(self, strongest: int, cells: int) -> "Overlaps":
        """The `strongest` frequencies (they are ordered by power) in about so many `cells`."""
        every = max(1, self.spectra.shape[2] // cells)
        parts = self.spectra[:, :strongest, ::every], self.q[:strongest], self.k[:, ::every]
        return eqx.tree_at(lambda o: (o.spectra, o.q, o.k), self, parts)

    def transposed(self) -> "Overlaps":
        """The same scans with their axes exchanged."""
        return eqx.tree_at(lambda o: o.q, self, self.q[:, ::-1])


class Lens(eqx.Module):
    """What the fit varies: `rotation` (rad), aberrations (Å) of each scan, `shift` (y, x) Å."""

    rotation: Float[Array, ""]
    aberrations: dict[str, Float[Array, " scans"]]
    shift: Float[Array, "scans 2"]


def overlaps(
    signals: Sequence[Signals],
    step: tuple[float, float],
    energy: float,
    semiangle: float,
    pixel: float,
    strongest: int = STRONGEST,
) -> Overlaps:
    """Spectra of the bright-field images of scans with one raster and one disc.

    `step` (slow, fast) Å, `semiangle` and `pixel` mrad. Half of the frequencies up to twice the
    aperture, lowest ones left out that a window of the scan cannot tell from its mean; ordered by
    power, `strongest` at most.

    **Raises:** InputError if the scans differ in shape, or have no frequency that overlaps.
    """
    shapes = {s.images.shape[:2] for s in signals}
    if len(shapes) != 1:
        raise InputError(f"Scans of one series must have one shape, got {sorted(shapes)}.")
    lam = wavelength(energy)
    common, chosen = _common_cells(signals)
    (shape,) = shapes
    axes = (np.fft.fftfreq(n, d) for n, d in zip(shape, step, strict=True))
    q = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    cutoff = semiangle * 1e-3 / lam
    size = np.hypot(q[..., 0], q[..., 1])
    least = 1.5 / min(n * d for n, d in zip(shape, step, strict=True))
    half = (q[..., 0] > 0) | ((q[..., 0] == 0) & (q[..., 1] > 0))
    use = half & (size < 1.9 * cutoff) & (size > least)
    if not use.any():
        raise InputError(
            f"No frequency of a {shape[0]} × {shape[1]} scan with a step of {step} Å lies between "
            f"{least:.3g} and {1.9 * cutoff:.3g} 1/Å, where the discs overlap; scan a larger field."
        )
    spectra = []
    for one, columns in zip(signals, chosen, strict=True):
        images = one.images[..., columns]
        mean = images.mean((0, 1))
        found = np.fft.fft2(images / mean - 1, axes=(0, 1))[use]
        spectra.append(found * np.sqrt(mean / math.prod(shape)))
    power = np.sum(np.abs(np.array(spectra)) ** 2, (0, 2))
    order = np.argsort(-power)[:strongest]
    k = np.stack([s.cells[c] for s, c in zip(signals, chosen, strict=True)]) * (pixel * 1e-3 / lam)
    side = math.sqrt(float(np.median(signals[0].cell_pixels))) * pixel * 1e-3 / lam
    single = lambda a: jnp.asarray(a, jnp.float32)
    return Overlaps(
        jnp.asarray(np.array(spectra)[:, order], jnp.complex64), single(q[use][order]), single(k),
        float(energy), float(cutoff), float(side),
    )  # fmt: skip


def _common_cells(signals):
    """Cells that all scans have, and their columns in each."""
    named = [{tuple(name): i for i, name in enumerate(s.names)} for s in signals]
    common = sorted(set.intersection(*(set(n) for n in named)))
    return common, [np.array([n[name] for name in common]) for n in named]


def explained(lens: Lens, data: Overlaps, depths: tuple[float, ...] = (0.0,)) -> Float[Array, ""]:
    """Part (0 to 1) of the power of the spectra that the model holds, its unknowns fitted.

    Layers at `depths` (Å) are shared by all scans.
    """
    right, normal = _normal_equations(lens, data, depths)
    held = jnp.sum(jnp.real(jnp.sum(right.conj() * _solved(normal, right, data.cells), -1)))
    return held / jnp.sum(jnp.abs(data.spectra) ** 2)


def contrast(
    lens: Lens, data: Overlaps, depths: tuple[float, ...] = (0.0,)
) -> tuple[Complex[Array, "q layers"], Complex[Array, "q layers"]]:
    """Spectra of phase and of amplitude contrast (negative: electrons lost) of each layer.

    A weak object is 1 + a + i phi with real a and phi: o(q) = a(q) + i phi(q), and o*(-q) is
    a(q) - i phi(q).
    """
    right, normal = _normal_equations(lens, data, depths)
    plus, minus = jnp.split(_solved(normal, right, data.cells), 2, axis=-1)
    return (plus - minus) / 2j, (plus + minus) / 2


def _normal_equations(lens: Lens, data: Overlaps, depths):
    """Columns against data (q, columns), and against each other, of all scans together."""
    cos, sin = jnp.cos(lens.rotation), jnp.sin(lens.rotation)
    q = data.q
    turned = jnp.stack([cos * q[:, 0] + sin * q[:, 1], cos * q[:, 1] - sin * q[:, 0]], -1)

    def one(aberrations, shift, k, spectra):
        columns = _columns(aberrations, shift, turned, k, data, depths)
        right = jnp.einsum("cqk,qk->qc", columns.conj(), spectra)
        return right, jnp.einsum("cqk,dqk->qcd", columns.conj(), columns)

    each = jax.vmap(one)(lens.aberrations, lens.shift, data.k, data.spectra)
    return tuple(jnp.sum(part, 0) for part in each)


def _columns(aberrations, shift, q, k, data: Overlaps, depths):
    """A*(k) A(k - q) and A(k) A*(k + q), for each depth: (columns, q, k)."""
    lam = wavelength(data.energy)
    own = {name: value[None] for name, value in aberrations.items()}

    def phase(k):
        chi = aberration_phase(own, k[..., 0], k[..., 1], data.energy)[0]
        return jnp.stack([chi + math.pi * lam * z * jnp.sum(k**2, -1) for z in depths])

    def aperture(k):
        return jnp.clip((data.cutoff - jnp.hypot(k[..., 0], k[..., 1])) / data.width + 0.5, 0, 1)

    ramp = 2 * math.pi * jnp.sum(q * shift[None], -1)[None, :, None]
    minus, plus = k[None] - q[:, None], k[None] + q[:, None]
    here, open_ = phase(k)[:, None], aperture(k)[None]
    wave = lambda amplitude, angle: amplitude.astype(data.spectra.dtype)[None] * phase_factor(angle)
    u = wave(open_ * aperture(minus), ramp + here - phase(minus))
    v = wave(open_ * aperture(plus), ramp - here + phase(plus))
    return jnp.concatenate([u, v])


def _solved(normal, right, cells: int):
    """The unknowns; those that hardly any of the `cells` determine are kept at zero."""
    ridge = RIDGE * cells
    if right.shape[-1] == 2:  # the closed form spares the search a thousand small solutions
        first, second, mixed = normal[:, 0, 0] + ridge, normal[:, 1, 1] + ridge, normal[:, 0, 1]
        determinant = first * second - mixed * mixed.conj()
        a = (second * right[:, 0] - mixed * right[:, 1]) / determinant
        b = (first * right[:, 1] - mixed.conj() * right[:, 0]) / determinant
        return jnp.stack([a, b], -1)
    diagonal = ridge * jnp.eye(right.shape[-1], dtype=normal.dtype)[None]
    return jnp.linalg.solve(normal + diagonal, right[..., None])[..., 0]
