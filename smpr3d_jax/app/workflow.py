"""The whole job, one stage a line: files -> dataset -> model -> reconstruction -> sections.

Every stage is a function of what the one before gave. Problems are found in `prepare`, before
anything long is computed; `run` writes nothing before it has a result.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from ..data.counts import Events, InputError
from ..data.dataset import Dataset, hold_out
from ..data.readers import check_counts, check_series, load_series, Source, survey
from ..inverse import design, losses, priors, refinement, updates
from ..inverse.batches import chunks, each, ordered
from ..inverse.reconstruction import reconstruct, Result, Step
from ..inverse.sections import diagonal_gauge, Gauge
from ..inverse.structure import fit_structure
from ..physics import sparse
from ..physics.detector import Detector
from ..physics.forward import prepare as plan, Scattering, unscattered
from ..physics.optics import chromatic_spread, focal_series, Optics
from ..physics.smatrix import TiltModes
from . import ptychography
from .experiment import depth_range, Experiment, require_available, where
from .facts import merge_facts
from .sources import (
    detector_center,
    detector_offset,
    detector_pixel,
    mask_findings,
    open_sources,
    preprocessed,
    windowed,
)


try:
    import resource
except ModuleNotFoundError:  # Windows has none
    resource = None

LOOK_AROUND = (0.5, 0.8)
"""Parts of the iterations after which positions that fit badly are looked for elsewhere."""

GAUGE_RESIDUAL = 0.5
"""rad rms; where the diagonal of S leaves more, the fitted plane is an accident."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An experiment whose files have been looked at and found sufficient, and what was noticed."""

    experiment: Experiment
    sources: tuple[Source, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Refined:
    """A parameter, its value in the model that was kept, and after each step."""

    parameter: refinement.Parameter
    found: Float[np.ndarray, "*shape"]
    path: Float[np.ndarray, "steps *shape"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run found: the model, how it got there, and the figures that judge it.

    `structure` is the fit of layers to the same frames, where the experiment asks for one.
    """

    prepared: Prepared
    dataset: Dataset
    result: Result
    held_out: Int[np.ndarray, " frames"]
    gauge: Gauge
    metrics: dict[str, Any]
    refined: tuple[Refined, ...] = ()
    structure: Result | None = None


def prepare(experiment: Experiment, check_frames: bool = True) -> Prepared:
    """Open the files, complete the experiment with what they say, and question all of it.

    **Raises:** ExperimentError or InputError, naming file, key, value and remedy.
    """
    require_available(experiment)
    sources = open_sources(experiment)
    notes = list(check_series(sources, same_raster=True))
    experiment, said = merge_facts(experiment, [source.facts for source in sources])
    notes += said
    sources, said = preprocessed(experiment, sources)
    notes += said
    found = findings(experiment, sources)
    errors = [_told(experiment, f) for f in found if f.severity == "error"]
    if errors and not experiment.accept_implausible:
        raise InputError("\n".join(errors))
    notes += errors + [_told(experiment, f) for f in found if f.severity != "error"]
    if check_frames:
        notes += _looked_at(experiment, sources)
    return Prepared(experiment, sources, tuple(dict.fromkeys(notes)))


def _looked_at(experiment: Experiment, sources: Sequence[Source]) -> list[str]:
    """What the frames themselves say: faults, and whether the dose suffices."""
    notes, electrons = [], []
    for source in sources:
        seen = survey(source)
        said = check_counts(source, experiment.accept_implausible, seen)
        if experiment.method.loss == "poisson" and not experiment.accept_implausible:
            source.complain("not whole", np.flatnonzero(seen.faulty["not whole"]))
        notes += [f"{source.path.name}: {one}" for one in said]
        electrons.append(float(seen.electrons.mean()))
    return notes + [_told(experiment, f) for f in findings(experiment, sources, electrons)]


def _told(experiment: Experiment, finding: design.Finding) -> str:
    return f"{where(experiment, finding.key)}: {finding.message}"


def findings(
    experiment: Experiment, sources: Sequence[Source], electrons: Sequence[float] | None = None
) -> list[design.Finding]:
    """What `design.check` says of an experiment in which nothing is missing.

    `electrons` are those of a mean frame of each scan, where the frames have been looked at.
    """
    beam, geometry, method = experiment.beam, experiment.geometry, experiment.method
    assert beam.energy_ev and beam.semiangle_mrad and geometry.scan_step  # by `merge_facts`
    shape = sources[0].frame_shape
    return design.check(
        energy=beam.energy_ev, semiangle=beam.semiangle_mrad, defoci=_defoci(experiment),
        scan_step=geometry.scan_step, scan_shape=sources[0].scan_shape,
        detector_pixel=detector_pixel(experiment), detector_shape=shape,
        center=detector_center(experiment, shape),
        representation=method.representation, order=method.order,
        depth_range=depth_range(experiment), plane=_plane(experiment), electrons=electrons,
        spread=_focal_spread(experiment), source=beam.source_size_A,
    ) + mask_findings(experiment, sources)  # fmt: skip


def _defoci(experiment: Experiment) -> list[float]:
    return [float(scan.defocus or 0.0) for scan in experiment.scans]


def _plane(experiment: Experiment) -> float:
    """The plane to which both sides of S are referred: the middle of the specimen."""
    low, high = depth_range(experiment)
    plane = experiment.method.plane
    return (low + high) / 2 if plane is None else plane


def load(prepared: Prepared) -> Dataset:
    """Read all counts, the zero frequency brought to the corner, and place the probes."""
    geometry = prepared.experiment.geometry
    assert geometry.scan_step is not None
    center = None if windowed(prepared.experiment) else geometry.center
    return load_series(
        prepared.sources, geometry.scan_step, float(np.deg2rad(geometry.rotation_deg)),
        geometry.transpose, center, [scan.shift for scan in prepared.experiment.scans],
    )  # fmt: skip


def optics(experiment: Experiment) -> Optics:
    """The lens of every scan."""
    beam = experiment.beam
    assert beam.energy_ev and beam.semiangle_mrad
    each = [scan.aberrations or beam.aberrations for scan in experiment.scans]
    spread = _focal_spread(experiment)
    return focal_series(
        beam.energy_ev, beam.semiangle_mrad, _defoci(experiment), each, beam.source_size_A, spread
    )


def _focal_spread(experiment: Experiment) -> float | None:
    """Rms, Å: as given, or from lens and energy spread."""
    beam = experiment.beam
    if beam.cc_mm is None or beam.energy_spread_ev is None or beam.energy_ev is None:
        return beam.defocus_spread_A
    return chromatic_spread(beam.cc_mm, beam.energy_ev, beam.energy_spread_ev)


def camera(experiment: Experiment, shape: tuple[int, int]) -> Detector:
    """The detector after its centre has been brought to a pixel; what is left is its offset."""
    geometry = experiment.geometry
    # Said of the pixels in the files; a binned one is wider and gathers more.
    factor = experiment.preprocess.bin
    leaf = lambda value, by: None if value is None else jnp.asarray(value * by, float)
    # Refined optics, and potentials, are wrong where the probe's tails are cut off.
    halo = bool(experiment.refine or experiment.structure)
    halo = halo if geometry.halo is None else geometry.halo
    return Detector(
        shape, detector_pixel(experiment), geometry.pixel_integration,
        detector_offset(experiment, shape),
        halo=halo,
        background=leaf(geometry.background, factor**2),
        blur=leaf(geometry.blur_pixels, 1 / factor),
    )  # fmt: skip


def starting_model(experiment: Experiment, dataset: Dataset) -> Scattering:
    """Vacuum seen through the experiment's lens, scan and camera."""
    method = experiment.method
    order = None if method.representation == "beams" else method.order
    detector = camera(experiment, dataset.counts.frame_shape)
    lens, plane = optics(experiment), _plane(experiment)
    moved = {"positions", "shift", "rotation", "affine", "camera_length"} & set(experiment.refine)
    # Four standard deviations of an offset stay inside the field.
    slack = 4 * _position_sigma(experiment) if moved else 0.0
    if method.name != "smatrix":
        ptychography.require_refinable(experiment)
        return ptychography.starting_object(experiment, dataset, lens, detector, slack)
    return unscattered(lens, detector, dataset.scan, dataset.dose, plane, order, slack)


def _position_sigma(experiment: Experiment) -> float:
    assert experiment.geometry.scan_step is not None
    half = math.sqrt(math.prod(experiment.geometry.scan_step)) / 2
    return experiment.refinement.position_sigma_A or half


def refined_parameters(
    experiment: Experiment, model: Scattering
) -> tuple[Scattering, tuple[refinement.Parameter, ...]]:
    """The model with all that `refine` names, and the parameters."""
    model, parameters = refinement.refine(model, experiment.refine)
    sigma = {"positions": _position_sigma(experiment)}
    return model, tuple(p._replace(sigma=sigma.get(p.name, p.sigma)) for p in parameters)


def noise_model(experiment: Experiment) -> losses.Noise:
    """The noise model that the experiment names."""
    method = experiment.method
    if method.loss == "poisson":
        return losses.poisson(method.background)
    return losses.NOISES[method.loss]()


def loss(experiment: Experiment, dataset: Dataset) -> losses.Loss:
    """What is minimised; few electrons are compared at the pixels that they hit alone."""
    method, counts = experiment.method, dataset.counts
    if method.loss == "poisson" and isinstance(counts, Events) and dataset.mask is None:
        f = experiment.geometry.pixel_integration
        price = sparse.costs(counts.frame_shape, counts.pixels.shape[1], f, f > 1)
        if min(price.values()) < price["pattern"]:
            return losses.event_poisson(method.background)
    return losses.objective(noise_model(experiment))


def subspace_tolerance(experiment: Experiment, dose: float) -> float:
    """Smallest eigenvalue of the depth range that is kept: noise over signal.

    0.03 from 16,000 electrons a frame (`dose`) on, ten times as much from a tenth of them down.
    """
    given = experiment.method.subspace_tolerance
    return float(np.clip(0.03 * 16e3 / dose, 0.03, 0.3)) if given is None else given


def optimiser(
    experiment: Experiment,
    model: Scattering,
    noise: losses.Noise,
    frames: int,
    parameters: Sequence[refinement.Parameter] = (),
) -> updates.Updates:
    """Nesterov's method at the largest safe step, with the depth-range subspace in tilt modes.

    Parameters are moved by Adam, with steps that fall to a twentieth in the course of the run.
    """
    method, how, project = experiment.method, experiment.refinement, None
    if isinstance(model.specimen, TiltModes) and method.subspace_weight > 0:
        basis = priors.depth_range_basis(
            model.specimen, model.optics.energy, depth_range(experiment),
            tolerance=subspace_tolerance(experiment, float(jnp.mean(model.dose))),
        )  # fmt: skip
        project = priors.depth_range(model.specimen, basis, method.subspace_weight)
    step = experiment.geometry.scan_step
    assert step is not None
    specimen = updates.accelerated(model, noise, step, frames, project)
    if not parameters:
        return specimen
    beat = updates.Beat(how.first, how.every)
    beats = {"optics": updates.Beat(how.first, how.every * how.optics_every)}
    count = lambda beat: max(1, sum(beat.due(n) for n in range(1, method.iterations + 1)))

    def adam(parameter: refinement.Parameter) -> optax.GradientTransformation:
        lens = any(leaf.startswith("optics.") for leaf in parameter.leaves())
        moves = count(beats["optics"] if lens else beat)
        rate = how.position_rate if parameter.of_frames else how.rate
        # Gradients change as the specimen forms, so that old ones should not be long remembered.
        return optax.adam(optax.cosine_decay_schedule(rate, moves, 0.05), b2=0.95)

    leaves = refinement.moving_leaves(parameters)
    joint = refinement.joint(parameters, adam, frames)
    return updates.per_leaf(
        {**specimen.optimisers, leaves: joint}, {leaves: beat, **beats}, refinement.OF_FRAMES
    )


def fit(
    prepared: Prepared, dataset: Dataset, callback: Callable[[Step], None] = lambda step: None
) -> Outcome:
    """Recover the specimen from the training frames, and judge it by those held out."""
    begin = time.monotonic()
    experiment, method = prepared.experiment, prepared.experiment.method
    training, held_out = hold_out(dataset, method.held_out, method.seed)
    model, chunk = starting_model(experiment, dataset), min(_chunk(experiment), len(training))
    model, parameters = refined_parameters(experiment, model)
    noise, paths, ring = noise_model(experiment), [], {}

    def follow(step: Step) -> None:
        paths.append(refinement.coordinates(step.state))
        callback(step)

    if method.name == "smatrix":
        result = _smatrix(
            experiment, model, dataset, noise, parameters, training, held_out, chunk, follow
        )
        gauge = diagonal_gauge(result.model.specimen, result.model.optics.energy)
    else:
        recover = partial(
            ptychography.fit_object, experiment, model, dataset, loss(experiment, dataset), noise,
            parameters, held_out=held_out,
        )  # fmt: skip
        result, gauge = recover(training, callback=follow), Gauge()
        if experiment.object.halves:
            parts = [recover(half).model for half in ptychography.halves(dataset, training)]
            ring = {"ring_correlation": ptychography.compare_halves(parts)}
    if gauge.residual > GAUGE_RESIDUAL:
        note = f"no output plane fits the unscattered waves (residual {gauge.residual:.2f} rad)"
        notes = (*prepared.notes, f"{note}; sections are referred to the reference plane")
        prepared, gauge = dataclasses.replace(prepared, notes=notes), Gauge()
    metrics = judge(result, dataset, training, held_out, chunk) | ring
    metrics["gauge_plane_A"] = _plane(experiment) + gauge.depth
    metrics["gauge_shift_A"] = list(gauge.shift)
    kept = refinement.coordinates(result.state)
    refined = tuple(
        Refined(p, p.value(kept[p.name]), np.stack([p.value(path[p.name]) for path in paths]))
        for p in parameters
    )
    metrics["refined"] = {
        r.parameter.name: r.found.tolist() for r in refined if not r.parameter.of_frames
    }
    layers = None
    if (wanted := experiment.structure) is not None:
        layers = fit_structure(
            result.model, dataset, wanted.depths, steps=wanted.steps, gauge=gauge, noise=noise,
            training=training, held_out=held_out, chunk=chunk,
        )  # fmt: skip
        metrics["structure"] = {name: values[-1] for name, values in layers.history.items()}
    metrics["seconds"] = time.monotonic() - begin
    return Outcome(prepared, dataset, result, held_out, gauge, metrics, refined, layers)


def _smatrix(
    experiment, model, dataset, noise, parameters, training, held_out, chunk, callback
) -> Result:
    """S from the training frames."""
    method = experiment.method
    near = chunks(ordered(model, training), chunk)[0]
    model = plan(model, chunk=near, moving=refinement.moving_leaves(parameters))
    go_on = partial(
        reconstruct, data=dataset, loss=loss(experiment, dataset),
        updates=optimiser(experiment, model, noise, len(training), parameters),
        training=training, held_out=held_out, chunk=chunk,
        patience=method.stop.patience if method.stop else None, seed=method.seed,
        callback=callback,
    )  # fmt: skip
    offsets = next((p for p in parameters if p.name == "positions"), None)
    return _looking_around(go_on, model, dataset, noise, offsets, method.iterations)


def _looking_around(go_on, model, dataset, noise, offsets, steps: int) -> Result:
    """One run, interrupted where positions are refined to look around for those that are lost."""
    stops = [] if offsets is None else [round(part * steps) for part in LOOK_AROUND]
    state, done, history = None, 0, {}
    for stop in sorted({*stops, steps} - {0}):
        result = go_on(model, steps=stop - done, state=state, done=done)
        for name, values in result.history.items():
            history[name] = history.get(name, []) + values
        model, state, reached = result.model, result.state, len(history["loss"])
        if offsets is None or reached < stop or stop == steps:  # done, or stopped for good
            break
        model, state, _ = refinement.look_around(model, state, dataset, noise, offsets)
        done = reached
    return Result(model, history, state)


def _chunk(experiment: Experiment) -> int:
    """Frames differentiated at once: beams share one product, beamlets a stretch of cache."""
    if experiment.method.representation == "beams":
        return 64 * len(experiment.scans)
    return 64


def judge(
    result: Result,
    dataset: Dataset,
    training: Int[np.ndarray, " training"],
    held_out: Int[np.ndarray, " held_out"],
    chunk: int,
) -> dict[str, Any]:
    """R-factors and deviances per pixel of the final model, and what the run cost."""
    every = ordered(result.model, np.concatenate([training, held_out]))
    merits = each(eqx.filter_jit(losses.figures_of_merit), result.model, dataset, every, chunk)
    score = partial(_score, merits, int(dataset.pixels))
    fitting, scan_of = np.isin(every, training), np.asarray(dataset.scan.series)[every]
    fitted, kept = score(fitting), score(~fitting)
    scans = range(int(scan_of.max()) + 1)
    per_scan = [score(fitting & (scan_of == scan))["r_factor"] for scan in scans]
    return {
        "r_factor": fitted["r_factor"],
        "r_factor_held_out": kept["r_factor"],
        "deviance": fitted["deviance"],
        "deviance_held_out": kept["deviance"],
        "noise_deviance": fitted["noise"],
        "noise_deviance_held_out": kept["noise"],
        "r_factor_per_scan": per_scan,
        "loss_history": result.history["loss"],
        "deviance_held_out_history": result.history.get("deviance_held_out", []),
        "iterations": len(result.history["loss"]),
        "peak_memory_bytes": peak_memory(),
    }


def _score(merits, pixels: int, among) -> dict[str, Any]:
    """R-factor and deviances per pixel of some of the frames; None of no frame."""
    if not np.any(among):
        return {"r_factor": None, "deviance": None, "noise": None}
    mean = {name: float(np.mean(values[among])) for name, values in merits.items()}
    return losses.summary(mean, pixels)


def peak_memory() -> int | None:
    """Most memory that this process has held, bytes; of the accelerator where there is one."""
    device = jax.local_devices()[0]
    known = None if device.platform == "cpu" else device.memory_stats()
    if known and "peak_bytes_in_use" in known:
        return int(known["peak_bytes_in_use"])
    if resource is None:
        return None
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
