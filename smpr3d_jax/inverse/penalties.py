"""What is believed before any count is seen, as penalties: scalars that grow where it fails.

A penalty is added to a loss by `losses.penalised`, with a weight that the user states:

    smooth = lambda model: 1e-3 * tilt_roughness(model.specimen)
    loss = penalised(objective(poisson()), smooth, small_offsets(positions, 0.3))

The loss is the negative log-likelihood in each frame, so that a weight is the cost of one unit of
the penalty a frame. Penalties of images are for sections and for slices alike:

    flat = lambda model: 0.5 * total_variation(depth_sections(model.specimen, 80e3, depths))
    matter = lambda model: 0.1 * negative_part(model.specimen.potential)

None is on unless asked for, and each says what it biases, for each biases something.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..physics.fourier import EXACT
from ..physics.smatrix import Beams, SMatrix
from .losses import Penalty
from .priors import mode_orders, tilt_energies


def excess_energy(specimen: SMatrix) -> Float[Array, ""]:
    """Mean over tilts of max(0, energy - 1)², for waves that carry more electrons than came in.

    The smooth relative of `priors.unit_energy`, which says what the energy is; without unit.

    **Biases:** 0 inside the set; outside it as that projection does, but gently.
    """
    weights = jnp.asarray(specimen.tilts().weights, specimen.waves.real.dtype)
    return jnp.sum(weights * jnp.maximum(tilt_energies(specimen) - 1, 0) ** 2)


def tilt_roughness(specimen: SMatrix) -> Float[Array, ""]:
    """Mean over field and tilts of |d s_h/d(h/cutoff)|²: how fast the waves change with the tilt.

    In modes sum_pq D_pq Re mean(conj(sigma_p) sigma_q), D_pq = sqrt((n+1)(n'+1)) (l (l + 2) - m²)
    for polynomials of one azimuthal order m and of radial orders n and n', l the lesser of the two
    (Green's theorem: the Laplacian of the lower one is orthogonal to the higher). In beams the
    differences of neighbours along both axes. A layer of phase phi at distance z from the plane
    adds the mean of |lambda z cutoff grad phi|²; no unit.

    **Biases:** all scattering is drawn towards the specimen's plane and its finest detail is
    weakened, the more the further from that plane it lies.
    """
    if isinstance(specimen, Beams):
        return _roughness_of_beams(specimen)
    waves = specimen.waves.reshape(specimen.waves.shape[0], -1)
    stiffness = jnp.asarray(gradient_overlaps(specimen.order), waves.dtype)
    bent = jnp.matmul(stiffness, waves, precision=EXACT)
    return jnp.sum((waves.conj() * bent).real) / waves.shape[1]


def gradient_overlaps(order: int) -> Float[np.ndarray, "modes modes"]:
    """Mean over the unit disc of grad Z_p . grad Z_q, for `smatrix.tilt_polynomials`."""
    n, m, sine = np.asarray(list(mode_orders(order))).T
    pair = lambda a: (a[:, None], a[None, :])
    least = np.minimum(*pair(n))
    same = (m[:, None] == m) & (sine[:, None] == sine)
    return np.where(same, np.sqrt((n[:, None] + 1) * (n + 1)) * (least * (least + 2) - m**2), 0.0)


def _roughness_of_beams(specimen: Beams) -> Float[Array, ""]:
    steps = 1 / np.asarray(specimen.window.extent)
    place = {tuple(n): i for i, n in enumerate(np.rint(specimen.points / steps).astype(int))}
    total = jnp.zeros((), specimen.waves.real.dtype)
    for axis, step in enumerate(steps / specimen.cutoff):
        move = np.eye(2, dtype=int)[axis]
        pairs = [(i, place.get((n[0] + move[0], n[1] + move[1]))) for n, i in place.items()]
        here, there = np.asarray([(i, j) for i, j in pairs if j is not None]).T
        change = specimen.waves[there] - specimen.waves[here]
        total = total + jnp.mean(jnp.abs(change) ** 2) / float(step) ** 2
    return total


def total_variation(
    images: Float[Array, "*stack y x"],
    sampling: tuple[float, float] = (1.0, 1.0),
    rounding: float = 1e-3,
) -> Float[Array, ""]:
    """Mean over pixels of sqrt(|grad|² + r²) - r, with differences of neighbouring pixels.

    **Arguments:** `sampling` (y, x) Å makes the unit that of `images` per Å; `rounding` r, in the
    same unit, is the slope below which it is quadratic, so that it can be differentiated.

    **Biases:** towards flat patches with sharp borders: noise goes first, then weak fine detail,
    and every bright patch loses contrast, the more the smaller it is. Atoms become plateaus.
    """
    rise = (images[..., 1:, :-1] - images[..., :-1, :-1]) / float(sampling[0])
    run = (images[..., :-1, 1:] - images[..., :-1, :-1]) / float(sampling[1])
    return jnp.mean(jnp.sqrt(rise**2 + run**2 + rounding**2)) - rounding


def negative_part(images: Float[Array, "*stack y x"], floor: float = 0.0) -> Float[Array, ""]:
    """Mean over pixels of min(0, image - `floor`)²; unit of `images` squared.

    For potentials, which matter makes positive. The phase of a confocal section has mean about 0,
    for the lowest transfers are not focused: give a `floor` below that of empty places.

    **Biases:** lifts noise to a positive mean, and with it what lies around bright places; real
    negative values, as the rings of a band-limited atom, are lost.
    """
    return jnp.mean(jnp.minimum(images - floor, 0) ** 2)


def small_offsets(nominal: Float[np.ndarray | Array, "frames 2"], sigma: float) -> Penalty:
    """Negative log prior of independent position errors, divided by the number of frames.

    sum |r - nominal|²/(2 sigma²)/frames over `model.scan.positions`, with `sigma` (Å) the standard
    deviation of either coordinate.

    **Biases:** offsets shrink by sigma²/(sigma² + s²), s the error that the counts alone leave, and
    slow drift, which many frames would agree on, as much as the rest.
    """
    nominal, scale = np.asarray(nominal), 2 * _positive("small_offsets", sigma) ** 2 * len(nominal)

    def penalty(model):
        positions = model.scan.positions
        return jnp.sum((positions - jnp.asarray(nominal, positions.dtype)) ** 2) / scale

    return penalty


def smooth_drift(nominal: Float[np.ndarray | Array, "frames 2"], sigma: float) -> Penalty:
    """Negative log prior of a random walk of the position errors, divided by the number of frames.

    sum |u_(t+1) - u_t|²/(2 sigma²)/frames with u = r - nominal, over frames that follow each other
    in the same scan; frames are in the order in which they were taken. `sigma` is in Å a square
    root of a frame: after t frames either coordinate has wandered by sigma sqrt(t).

    **Biases:** none against a constant shift of a scan; jitter from frame to frame is smoothed
    away, and jumps, as where a line begins, are spread over their neighbours.
    """
    nominal, scale = np.asarray(nominal), 2 * _positive("smooth_drift", sigma) ** 2 * len(nominal)

    def penalty(model):
        positions, series = model.scan.positions, model.scan.series
        offset = positions - jnp.asarray(nominal, positions.dtype)
        step = jnp.where((series[1:] == series[:-1])[:, None], offset[1:] - offset[:-1], 0)
        return jnp.sum(step**2) / scale

    return penalty


def _positive(who: str, sigma: float) -> float:
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"`{who}` needs a positive `sigma` in Å, got {sigma}.")
    return float(sigma)
