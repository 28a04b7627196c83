"""From a scattering matrix to the potential behind it: a few layers, fitted to the counts.

Sections of S say where to start. A section at one layer sees the others out of focus: to first
order the phases of the sections at the layers' depths are G phi, with phi the layers' phases and,
for each transfer q, the overlap of what they scatter into the tilts of the aperture,
G_lm(q) = Re mean_h exp(i pi lambda (z_l - z_m)(q² + 2 q.h))
        = cos(pi lambda dz q²) 2 J1(x)/x,  x = 2 pi lambda cutoff q dz.
So phi = (G + e)^-1 sections, by least squares. G is also what couples the layers in the fit: the
same inverse makes all that the data can tell apart converge at one speed.

What they cannot: the mean of each layer, all depths moved with all defoci, and, where layers lie
closer than 0.7/(alpha q), how a transfer q is shared among them (equally, to start with).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ..data.dataset import Dataset
from ..physics.forward import prepare, Scattering
from ..physics.fourier import EXACT, fft, ifft
from ..physics.grid import Grid
from ..physics.layers import empty_layers, Layers, probes_of, propagators
from ..physics.optics import interaction_parameter, wavelength
from ..physics.smatrix import place, SMatrix
from .losses import curvature, Noise, objective, penalised, Penalty, poisson
from .priors import ridge_amplitudes
from .reconstruction import reconstruct, Result, Step
from .refinement import OF_FRAMES
from .sections import depth_sections, Gauge
from .updates import nesterov, per_leaf, Updates


class Unmixing(eqx.Module):
    """(G + tolerance)^-1 for each |q|, tabulated as `rung` says for each pixel of a spectrum."""

    inverse: Float[Array, "rungs layers layers"]
    rung: Int[Array, "ky kx"]

    def __call__(self, planes: Float[Array, "layers y x"]) -> Float[Array, "layers y x"]:
        """Layers that together make `planes`, each seen in focus with all others behind it."""
        spectra = fft(planes.astype(np.result_type(planes.dtype, np.complex64)))

        def row(given):
            rung, spectrum = given
            inverse = self.inverse[rung].astype(spectrum.dtype)
            return jnp.einsum("xlm,mx->lx", inverse, spectrum, precision=EXACT)

        return ifft(jax.lax.map(row, (self.rung, spectra.swapaxes(0, 1))).swapaxes(0, 1)).real


def overlaps(
    depths: Float[np.ndarray, " layers"],
    radius: Float[np.ndarray, " rungs"],
    energy: float,
    cutoff: float,
) -> Float[np.ndarray, "rungs layers layers"]:
    """G_lm at transfers `radius` (1/Å) for layers at `depths` (Å); `energy` in eV, `cutoff` 1/Å."""
    lam, depths = wavelength(energy), np.asarray(depths, float)
    gaps, back = np.unique(np.abs(depths[:, None] - depths[None, :]), return_inverse=True)
    columns = []
    for gap in gaps:
        blur = ridge_amplitudes(0, 2 * math.pi * lam * cutoff * gap * radius)[..., 0]
        columns.append(blur * np.cos(math.pi * lam * gap * radius**2))
    return np.stack(columns, -1)[:, back.reshape(len(depths), len(depths))]


def unmixing(
    grid: Grid,
    depths: Float[np.ndarray, " layers"],
    energy: float,
    cutoff: float,
    tolerance: float = 0.1,
    dtype: jax.typing.DTypeLike = float,
) -> Unmixing:
    """The inverse of the overlaps of layers at `depths` (Å) on `grid`.

    `tolerance` is the noise over the signal of a layer in focus, in power: what the layers have in
    common is kept, differences that hardly reach the data are not made up.
    """
    ky, kx = np.broadcast_arrays(*grid.frequencies())
    radius, depths = np.hypot(ky, kx), np.asarray(depths, float)
    # The overlap turns by pi lambda dz q²: 0.05 rad at the corner of the spectrum is one rung.
    edge = 2 * math.pi * wavelength(energy) * (radius.max() + cutoff) * np.ptp(depths)
    rungs = max(2, math.ceil(edge * radius.max() / 0.05) + 1)
    ladder = np.linspace(0, radius.max(), rungs)
    overlap = overlaps(depths, ladder, energy, cutoff)
    inverse = np.linalg.inv(overlap + tolerance * np.eye(len(depths)))
    rung = jnp.asarray(np.rint(radius / ladder[1]), jnp.int32)
    return Unmixing(jnp.asarray(inverse, dtype), rung)


def layers_from_sections(
    specimen: SMatrix,
    energy: float,
    depths: Sequence[float] | Float[np.ndarray, " layers"],
    gauge: Gauge | None = None,
    tolerance: float = 0.1,
    order: int | None = None,
) -> Layers:
    """Layers at `depths` (Å) whose sections would be, to first order, the phases seen in S.

    `gauge` and `energy` (eV) are those of `depth_sections`, `tolerance` that of `unmixing`;
    `order` asks for a correction, which is 0 to begin with. Scattering must be single per transfer;
    otherwise fit.

    **Raises:** ValueError for depths that do not increase.
    """
    depths, real = np.asarray(depths, float), specimen.waves.real.dtype
    layers = empty_layers(
        specimen.grid, specimen.origin, depths, specimen.plane, specimen.cutoff, order, real
    )
    phases = depth_sections(specimen, energy, depths, gauge=gauge)
    unmix = unmixing(specimen.grid, depths, energy, specimen.cutoff, tolerance, real)
    potential = unmix(phases) / interaction_parameter(energy)
    return eqx.tree_at(lambda layers: layers.potential, layers, potential.astype(real))


def structure_model(
    model: Scattering,
    depths: Sequence[float] | Float[np.ndarray, " layers"],
    gauge: Gauge | None = None,
    tolerance: float = 0.1,
    order: int | None = None,
) -> Scattering:
    """The model with its S-matrix replaced by `layers_from_sections`, all else as it was found."""
    if isinstance(model.specimen, Layers):
        raise ValueError("`structure_model` wants an S-matrix as the specimen, not layers.")
    layers = layers_from_sections(
        model.specimen, model.optics.energy, depths, gauge, tolerance, order
    )
    where = lambda m: (m.specimen, m.plan)
    return prepare(eqx.tree_at(where, model, (layers, None), is_leaf=lambda x: x is None))


@eqx.filter_jit
def illumination(model: Scattering) -> Float[Array, "layers y x"]:
    """Electrons that all frames together send through each pixel of each layer in vacuum.

    Remainders of the positions within a pixel are left out.
    """
    layers, window = _layers_of(model), model.window
    probes = probes_of(model.optics, layers, (window, None), model.dose, model.stretch).spectra[
        :, :, 0
    ]
    corner, _ = place(layers, model.scan.positions, window)
    steps = propagators(layers, window, model.optics.energy, model.stretch).astype(probes.dtype)
    inner = [slice(n // 2 - m // 2, n // 2 - m // 2 + m) for n, m in
             zip(probes.shape[-2:], window.shape, strict=True)]  # fmt: skip
    wave, powers = ifft(probes)[..., inner[0], inner[1]], []
    for step in steps:
        powers.append(jnp.sum(wave.real**2 + wave.imag**2, axis=1))
        wave = ifft(fft(wave) * step[None, None])
    shape = layers.grid.shape
    # The sum over frames is a convolution with the number of windows that begin at each pixel.
    begun = jnp.zeros((model.dose.shape[0], *shape), layers.potential.dtype)
    begun = begun.at[model.scan.series, corner[:, 0], corner[:, 1]].add(1)
    transform = lambda image: jnp.fft.rfft2(image, s=shape)
    total = jnp.einsum("dyx,ldyx->lyx", transform(begun), transform(jnp.stack(powers)))
    return jnp.fft.irfft2(total, s=shape)


def _layers_of(model: Scattering) -> Layers:
    if not isinstance(model.specimen, Layers):
        raise ValueError(
            f"The specimen must be `Layers`, got {type(model.specimen).__name__}; see "
            "`structure_model`."
        )
    return model.specimen


def structure_updates(
    model: Scattering,
    noise: Noise,
    frames: int,
    tolerance: float = 0.1,
    project: Callable[[Array], Array] | None = None,
) -> Updates:
    """Nesterov's method for the potential, and the correction where there is one.

    The gradient of the potential is unmixed over the layers with `tolerance`, so that what tells
    layers apart converges as fast as what they share; the step is the largest that is safe for
    `losses.objective(noise)` over `frames` frames. `project` may keep the potential in a set, as
    `lambda potential: jnp.maximum(potential, 0)`.
    """
    layers, energy = _layers_of(model), model.optics.energy
    sigma, real = interaction_parameter(energy), layers.potential.dtype
    unmix = unmixing(layers.grid, np.asarray(layers.depths), energy, layers.cutoff, tolerance, real)
    step = frames / (curvature(noise) * float(illumination(model).max()))
    step = step if layers.correction is None else step / 2
    descend = optax.chain(
        optax.stateless_with_tree_map(lambda gradient, _: unmix(jnp.asarray(gradient))),
        nesterov(step / sigma**2, project),
    )
    moves = {"specimen.potential": descend}
    return per_leaf(
        moves if layers.correction is None else moves | {"specimen.correction": nesterov(step)}
    )


def fit_structure(
    model: Scattering,
    data: Dataset,
    depths: Sequence[float] | Float[np.ndarray, " layers"],
    *,
    steps: int = 10,
    gauge: Gauge | None = None,
    noise: Noise | None = None,
    tolerance: float = 0.1,
    order: int | None = None,
    penalty: Penalty | None = None,
    also: Mapping[Any, optax.GradientTransformation] | None = None,
    training: Int[np.ndarray, " fitted"] | None = None,
    held_out: Int[np.ndarray, " kept"] | None = None,
    chunk: int = 64,
    patience: int | None = None,
    callback: Callable[[Step], None] = lambda step: None,
) -> Result:
    """The potential of layers at `depths` (Å) behind a finished S-matrix `model`, fitted to `data`.

    **Arguments:** `gauge`, `tolerance` and `order` (of the correction) are those of
    `layers_from_sections`; `noise` is Poisson's unless given, `penalty` is added to its loss.
    `also` moves other leaves as well, as in `per_leaf`: `{"scan.positions": optax.adam(0.02)}`, or
    `{moving_leaves(p): joint(p, ...)}` of parameters p (see `refinement`). The rest is as in
    `reconstruct`. Of a finished run: `fit_structure(outcome.result.model, outcome.dataset, depths,
    gauge=outcome.gauge, held_out=outcome.held_out)`.

    Noise comes into what tells close layers apart before the deviance of held-out frames rises:
    few steps are enough (measured on two nanotubes: three), and few layers are better.

    **Returns:** a `Result` whose `model.specimen.potential` is the volume, in V Å a layer.
    """
    noise = poisson() if noise is None else noise
    start = structure_model(model, depths, gauge, tolerance, order)
    fitted = len(data) - (0 if held_out is None else len(held_out))
    frames = fitted if training is None else len(training)
    descent = structure_updates(start, noise, frames, tolerance).optimisers
    updates = per_leaf({**descent, **(also or {})}, own=OF_FRAMES)
    loss = objective(noise) if penalty is None else penalised(objective(noise), penalty)
    return reconstruct(
        start, data, loss, updates, steps=steps, training=training, held_out=held_out,
        chunk=chunk, patience=patience, callback=callback,
    )  # fmt: skip
