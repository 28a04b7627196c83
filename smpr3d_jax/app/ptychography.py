"""Ptychography with slices: the stage between dataset and outcome of `multislice`, `singleslice`.

Everything before and after it is that of the S-matrix: the same files, scans, refined parameters,
figures of merit, and outputs; sections are those of the S-matrix of the slices found.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from ..data.dataset import Dataset
from ..inverse import constraints, losses, pie, refinement, updates
from ..inverse.epochs import reconstruct_in_epochs
from ..inverse.reconstruction import Result, Step
from ..inverse.resolution import FEWEST_PIXELS, ring_correlation
from ..physics.detector import Detector
from ..physics.forward import prepare as plan, Scattering
from ..physics.optics import Optics
from ..physics.ptychography import empty_object, ObjectSlices, pixel_probes, tilt_waves
from ..physics.smatrix import field
from .experiment import depth_range, Experiment, ExperimentError, where


REFINABLE = (
    "positions", "shift", "rotation", "affine", "tilt", "depths", "background", "blur", "exposure",
)  # fmt: skip
"""What `refine` may name beside a probe in pixels, which holds what the lens does."""


def slice_depths(experiment: Experiment, optics: Optics) -> Float[np.ndarray, " slices"]:
    """Depths (Å) of the slices: the middles of equal parts of the depth range."""
    low, high = depth_range(experiment)
    count = experiment.object.slices
    if experiment.method.name == "singleslice":
        count = 1
    elif count is None:
        count = max(2, math.ceil((high - low) / (optics.depth_of_field / 2)))
    return low + (high - low) * (np.arange(count) + 0.5) / count


def starting_object(
    experiment: Experiment, dataset: Dataset, optics: Optics, detector: Detector, slack: float
) -> Scattering:
    """Empty slices, lit by the lens's probe; positions may move by `slack` Å."""
    wanted = experiment.object
    window = detector.window(optics.wavelength)
    margin = 2 + math.ceil(slack / min(window.sampling))
    grid, origin = field(np.asarray(dataset.scan.positions, float), window, margin)
    depths = slice_depths(experiment, optics)
    seen = np.ptp(np.asarray(dataset.scan.positions, float), axis=0) / window.sampling
    if wanted.halves and min(seen) < FEWEST_PIXELS:
        raise ExperimentError(
            f"{where(experiment, 'object.halves')}: the scan covers {seen[0]:.1f} x {seen[1]:.1f} "
            f"pixels (y, x), and a ring correlation wants {FEWEST_PIXELS}; take it out"
        )
    specimen = empty_object(
        grid, origin, depths, wanted.parametrisation, wanted.object_states,
        band_limit=wanted.band_limit,
    )  # fmt: skip
    light = None
    if wanted.probe == "pixels":
        light = pixel_probes(optics, window, dataset.dose, float(depths[0]), wanted.probe_states)
    return Scattering(optics, specimen, dataset.scan, detector, dataset.dose, illumination=light)


def require_refinable(experiment: Experiment) -> None:
    """Refuse what object and probe take up themselves.

    **Raises:** ExperimentError naming the key.
    """
    taken = [n for n in experiment.refine if n not in REFINABLE]
    if experiment.object.probe == "pixels" and taken:
        raise ExperimentError(
            f"{where(experiment, 'refine')}: {taken[0]} is part of a probe in pixels; take it out, "
            "or write object: {probe: optics}"
        )
    still = experiment.object.probe == "optics" or experiment.object.probe_step == 0
    if experiment.object.rule == "lsqml" and still:
        raise ExperimentError(
            f"{where(experiment, 'object.rule')} = lsqml moves object and probe together and needs "
            "a probe in pixels that moves; take rpie"
        )
    if "camera_length" in experiment.refine:
        raise ExperimentError(
            f"{where(experiment, 'refine')}: camera_length is the sampling of an object in slices, "
            "which is fixed; calibrate it first"
        )


def optimiser(
    experiment: Experiment,
    noise: losses.Noise,
    parameters: Sequence[refinement.Parameter],
    frames: int,
) -> updates.Updates:
    """Object and probe by the rule that the experiment names, parameters by Adam.

    Steps fall exponentially to `last_step` of what they were; parameters that only frames have move
    once an iteration.
    """
    wanted, how, epochs = experiment.object, experiment.refinement, experiment.method.iterations
    batches = max(1, frames // wanted.batch) * epochs
    fall = lambda rate: optax.exponential_decay(rate, batches, wanted.last_step)
    own_probe = wanted.probe == "pixels" and wanted.probe_step > 0
    if wanted.rule == "lsqml":
        rules = pie.lsqml(noise, fall(wanted.step)).optimisers
    elif wanted.rule == "adam":
        rules = {
            "specimen.values": optax.adam(fall(wanted.step)),
            "illumination.modes": optax.adam(fall(wanted.probe_step)),
        }
    else:
        alpha = 1.0 if wanted.rule == "epie" else 0.1
        rules = pie.rpie(noise, fall(wanted.step), fall(wanted.probe_step), alpha).optimisers
    if not own_probe:
        rules = {name: rule for name, rule in rules.items() if "illumination" not in name}
    own = [p for p in parameters if set(p.leaves()) & set(refinement.OF_FRAMES)]
    common = [p for p in parameters if p not in own]
    beats = {}
    for group, moves in ((own, epochs), (common, batches)):
        if group:
            leaves = refinement.moving_leaves(group)
            rate = lambda p, moves=moves: _adam(p, how, moves)
            rules = rules | {leaves: refinement.joint(group, rate, frames)}
            beats[leaves] = updates.Beat(how.first, 1)
    return updates.per_leaf(rules, beats, refinement.OF_FRAMES)


def _adam(parameter, how, moves: int) -> optax.GradientTransformation:
    rate = how.position_rate / 5 if parameter.of_frames else how.rate / 5
    return optax.adam(optax.cosine_decay_schedule(rate, moves, 0.05), b2=0.95)


def fit_object(
    experiment: Experiment,
    model: Scattering,
    dataset: Dataset,
    loss: losses.Loss,
    noise: losses.Noise,
    parameters: Sequence[refinement.Parameter],
    training: Int[np.ndarray, " training"],
    held_out: Int[np.ndarray, " held_out"],
    callback: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Slices and probe from the training frames."""
    method, wanted = experiment.method, experiment.object
    model = plan(model, moving=refinement.moving_leaves(parameters))
    named = [n for n in wanted.constraints if wanted.probe == "pixels" or not _of_probe(n)]
    return reconstruct_in_epochs(
        model, dataset, loss, optimiser(experiment, noise, parameters, len(training)),
        epochs=method.iterations, batch_size=min(wanted.batch, len(training)),
        grouping=wanted.grouping, constraints=[getattr(constraints, n) for n in named],
        training=training, held_out=held_out,
        patience=method.stop.patience if method.stop else None, seed=method.seed,
        callback=callback,
    )  # fmt: skip


def _of_probe(name: str) -> bool:
    return name in (
        "centred_probe", "orthogonal_modes", "probe_in_aperture", "fixed_probe_intensity"
    )  # fmt: skip


def compare_halves(models: Sequence[Scattering]) -> dict[str, Any]:
    """Ring correlation of the phases of two objects, all slices together, where the scan went."""
    first, second = (_scanned_phase(model) for model in models)
    found = ring_correlation(first, second, models[0].specimen.grid.sampling)
    return {
        "radius_per_A": found.radius.tolist(), "correlation": found.correlation.tolist(),
        "half_bit": found.half_bit.tolist(), "resolution_A": found.resolution,
    }  # fmt: skip


def halves(dataset: Dataset, training: Int[np.ndarray, " training"]) -> list[np.ndarray]:
    """Training frames on the white and on the black fields of each scan's raster."""
    sums = [np.add.outer(np.arange(rows), np.arange(columns)).ravel()
            for rows, columns in dataset.scan_shapes]  # fmt: skip
    white = np.concatenate(sums)[training] % 2 == 0
    return [training[white], training[~white]]


def _scanned_phase(model: Scattering) -> Float[np.ndarray, "y x"]:
    specimen = model.specimen
    pixels = (np.asarray(model.scan.positions, float) - specimen.origin) / specimen.grid.sampling
    low, high = np.floor(pixels.min(axis=0)), np.ceil(pixels.max(axis=0)) + 1
    cut = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return np.asarray(specimen.phase(model.optics.energy), float).mean(axis=0).sum(axis=0)[cut]


def as_smatrix(model: Scattering, plane: float, order: int) -> Scattering:
    """The model with the S-matrix of its slices in their place, for sections."""
    if not isinstance(model.specimen, ObjectSlices):
        return model
    smatrix = tilt_waves(model.specimen, model.optics.energy, model.optics.cutoff, plane, order)
    return eqx.tree_at(lambda m: m.specimen, model, smatrix)


def object_contents(model: Scattering, first: tuple[float, float]) -> dict:
    """What `result.h5` keeps of slices and probe."""
    specimen, light = model.specimen, model.illumination
    if not isinstance(specimen, ObjectSlices):
        return {}
    found = {
        "transmission": np.asarray(specimen.transmission(model.optics.energy)),
        "phase": np.asarray(specimen.phase(model.optics.energy)),
        "z": np.asarray(specimen.depths, float),
        "pixel_size_A": list(specimen.grid.sampling),
        "origin_A": np.subtract(specimen.origin, first).tolist(),
        "tilt_mrad": np.asarray(specimen.tilt),
        "parametrisation": specimen.kind,
        "note": "transmission (states, slices, y, x) of slices at depths z; phase in rad",
    }
    if light is None:
        return {"object": found}
    probe = {
        "modes": np.asarray(light.modes),
        "pixel_size_A": list(model.window.sampling),
        "depth_A": float(jnp.min(specimen.depths)),
        "note": "(scans, states, y, x), root electrons, centred, at the first slice",
    }
    return {"object": found, "probe": probe}
