"""What a ptychographic model is made to obey between epochs: pure functions of a `Scattering`.

None is on unless it is asked for, and each says what it does to the physics. Some only choose among
models that the data cannot tell apart (`centred_probe`, `orthogonal_modes`, `anchored_positions`);
the others believe something about object or probe that the counts do not say.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..physics.forward import Scattering
from ..physics.fourier import EXACT, fft, ifft, phase_factor
from ..physics.grid import Grid
from ..physics.ptychography import Illumination, ObjectSlices, orthogonalised


def centred_probe(model: Scattering) -> Scattering:
    """Moves each scan's probe to the window's centre, and the object with the mean move.

    A gauge: frames are the same where all scans move alike, but for what leaves the field's edge.
    The centre is that of the intensity of all states, measured by the phase of its first
    harmonics, which a periodic window has.
    """
    specimen, light = model.specimen, _required(model)
    power = jnp.sum(light.modes.real**2 + light.modes.imag**2, axis=1)
    away = jnp.stack([_centre(power, axis) for axis in (0, 1)], axis=-1)
    modes = jax.vmap(lambda wave, by: _moved(wave, by, model.window))(light.modes, -away)
    values = _moved(specimen.values, -jnp.mean(away, axis=0), specimen.grid)
    return _with(model, values, modes)


def _centre(power: Float[Array, "scans y x"], axis: int) -> Float[Array, " scans"]:
    """Where the intensity lies beside pixel n//2, in pixels."""
    n = power.shape[axis + 1]
    line = jnp.sum(power, axis=2 - axis)
    turn = np.exp(-2j * np.pi * (np.arange(n) - n // 2) / n)
    turn = jnp.asarray(turn, np.result_type(line.dtype, np.complex64))
    first = jnp.sum(line.astype(turn.dtype) * turn[None], axis=1)
    return -jnp.angle(first) * n / (2 * math.pi)


def _moved(images, by: Float[Array, "2"], grid: Grid):
    """Images moved by `by` pixels (y, x), exactly within their band; real ones stay real."""
    spectrum = fft(images.astype(np.result_type(images.dtype, np.complex64)))
    for axis, n in enumerate(grid.shape):
        k = jnp.asarray(np.fft.fftfreq(n), by.dtype)
        ramp = phase_factor(-2 * math.pi * by[axis] * k).astype(spectrum.dtype)
        shape = [1] * spectrum.ndim
        shape[spectrum.ndim - 2 + axis] = n
        spectrum = spectrum * ramp.reshape(shape)
    moved = ifft(spectrum)
    return moved if jnp.iscomplexobj(images) else moved.real


def orthogonal_modes(model: Scattering) -> Scattering:
    """The same mixed probe in orthogonal modes, the brightest first: a gauge."""
    return eqx.tree_at(lambda m: m.illumination, model, orthogonalised(_required(model)))


def _required(model: Scattering) -> Illumination:
    if model.illumination is None or not isinstance(model.specimen, ObjectSlices):
        raise ValueError(
            "This constraint is for `ObjectSlices` lit by an `illumination` in pixels."
        )
    return model.illumination


def _with(model: Scattering, values, modes) -> Scattering:
    where = lambda m: (m.specimen.values, m.illumination.modes)
    return eqx.tree_at(where, model, (values, modes))


def probe_in_aperture(model: Scattering, beyond: float = 1.05) -> Scattering:
    """Takes from probes in pixels what lies outside `beyond` times the aperture.

    True of any probe that an aperture made; noise cannot hide in the probe then.
    """
    light = _required(model)
    ky, kx = model.window.frequencies()
    inside = jnp.asarray(np.hypot(ky, kx) <= beyond * model.optics.cutoff, light.modes.dtype)
    return _with(model, model.specimen.values, ifft(fft(light.modes) * inside[None, None]))


def fixed_probe_intensity(model: Scattering) -> Scattering:
    """Scales each scan's probes to the scan's `dose`.

    Fixes the factor between object and probe. Electrons that miss the detector then count as
    absorbed by the object.
    """
    light = _required(model)
    power = jnp.sum(light.modes.real**2 + light.modes.imag**2, axis=(1, 2, 3))
    factor = jnp.sqrt(model.dose / power)[:, None, None, None]
    return _with(model, model.specimen.values, light.modes * factor.astype(light.modes.dtype))


def positive_phase(model: Scattering) -> Scattering:
    """Phases below zero become zero.

    True of atoms' potentials, where the zero of the phase is that of vacuum; it lifts noise to a
    positive mean.
    """
    specimen = _slices(model)
    if specimen.kind != "transmission":
        values = specimen.values
        kept = jnp.maximum(values.real, 0)
        values = jax.lax.complex(kept, values.imag) if jnp.iscomplexobj(values) else kept
    else:
        amplitude = jnp.abs(specimen.values)
        values = amplitude.astype(specimen.values.dtype) * phase_factor(
            jnp.maximum(jnp.angle(specimen.values), 0)
        )
    return eqx.tree_at(lambda m: m.specimen.values, model, values)


def no_gain(model: Scattering) -> Scattering:
    """Slices that would make electrons let all of them pass instead: |t| <= 1.

    True of matter; the noise of |t| about 1 becomes absorption of half its size.
    """
    specimen = _slices(model)
    values = specimen.values
    if specimen.kind == "transmission":
        values = values / jnp.maximum(jnp.abs(values), 1).astype(values.dtype)
    elif jnp.iscomplexobj(values):
        values = jax.lax.complex(values.real, jnp.maximum(values.imag, 0))
    return eqx.tree_at(lambda m: m.specimen.values, model, values)


def smooth_slices(model: Scattering, width: float = 1.0) -> Scattering:
    """Blurs slices along the beam by a Gaussian of `width` slices rms; the ends repeat.

    For specimens that change slowly with depth; layers that differ become alike. Transmissions
    are blurred themselves, which for weak slices is their phases.
    """
    return _along_beam(model, _blur(_slices(model).depths.shape[0], width))


def equal_slices(model: Scattering) -> Scattering:
    """All slices become their mean: a crystal that is the same at all depths, or a first stage."""
    count = _slices(model).depths.shape[0]
    return _along_beam(model, np.full((count, count), 1 / count))


def _blur(count: int, width: float) -> Float[np.ndarray, "slices slices"]:
    reach = math.ceil(4 * width)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * width**2))
    matrix = np.zeros((count, count))
    for shift, weight in zip(range(-reach, reach + 1), weights / weights.sum(), strict=True):
        for row in range(count):
            matrix[row, min(max(row + shift, 0), count - 1)] += weight
    return matrix


def _along_beam(model: Scattering, matrix: Float[np.ndarray, "slices slices"]) -> Scattering:
    values = _slices(model).values
    mixed = jnp.einsum("st,otyx->osyx", jnp.asarray(matrix, values.dtype), values, precision=EXACT)
    return eqx.tree_at(lambda m: m.specimen.values, model, mixed)


def _slices(model: Scattering) -> ObjectSlices:
    if not isinstance(model.specimen, ObjectSlices):
        raise ValueError("This constraint is for a `Scattering` with `ObjectSlices`.")
    return model.specimen
