"""What a run leaves in its folder, and how a specimen is taken from there again.

`result.h5` holds the sections and everything needed to make others, and the potential of layers
where the experiment asks for it; `metrics.json` the figures of merit; `sections.tif` the volume
for ImageJ; `report.html` one page for people.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data.counts import InputError
from ..inverse.sections import Gauge, section_blocks, virtual_images
from ..physics.detector import annulus, Detector
from ..physics.forward import settled, trimmed
from ..physics.grid import Grid
from ..physics.layers import Layers
from ..physics.optics import Optics
from ..physics.ptychography import ObjectSlices
from ..physics.smatrix import Beams, SMatrix, TiltModes
from ..report import store
from ..report.page import report_page
from ..report.volumes import section_writer
from .experiment import section_depths, to_yaml
from .ptychography import as_smatrix, object_contents
from .schema import Sections
from .workflow import Outcome, Refined


class View(NamedTuple):
    """What sections are made from: S, the lens, the camera, the gauge, the first scan position."""

    specimen: SMatrix
    optics: Optics
    detector: Detector
    gauge: Gauge
    first: tuple[float, float]


class Planes(NamedTuple):
    """Sections to come, block by block, and where they lie."""

    blocks: Iterator[Float[Array, "block y x"]]
    shape: tuple[int, int]
    origin: tuple[float, float]
    units: str


def view(outcome: Outcome) -> View:
    """The view of a run that has just ended."""
    method = outcome.prepared.experiment.method
    model = as_smatrix(outcome.result.model, outcome.metrics["gauge_plane_A"], method.order)
    model = trimmed(settled(model))
    y, x = (float(v) for v in outcome.dataset.scan.positions[0])
    assert not isinstance(model.specimen, Layers)  # a run recovers an S-matrix
    return View(model.specimen, model.optics, model.detector, outcome.gauge, (y, x))


def planes(
    view: View, depths: Float[np.ndarray, " z"], settings: Sections, block: int = 8
) -> Planes:
    """Sections at `depths` in the mode that `settings` names; origins from the first position."""
    specimen = view.specimen
    relative = lambda origin: (origin[0] - view.first[0], origin[1] - view.first[1])
    if settings.mode in ("annular", "bright_field"):
        return _virtual(view, depths, settings, relative)
    pairs = section_blocks(
        specimen, view.optics.energy, depths, settings.mode, view.gauge, settings.collector_mrad,
        block,
    )  # fmt: skip
    units = "1" if settings.mode == "scem" else "rad"
    return Planes(
        (images for _, images in pairs), specimen.grid.shape, relative(specimen.origin), units
    )


def _virtual(view: View, depths, settings: Sections, relative) -> Planes:
    semiangle = view.optics.semiangle
    bright = settings.mode == "bright_field"
    edge = view.detector.pixel * min(view.detector.shape) / 2
    inner = 0.0 if bright else (settings.inner_mrad or 1.1 * semiangle)
    outer = settings.outer_mrad or (semiangle / 4 if bright else edge)
    mask = annulus(view.detector, outer, inner)
    make = lambda part: virtual_images(view.specimen, view.optics, view.detector, part, mask)
    first = make(depths[:1])
    rest = (make(depths[i : i + 1]).images for i in range(1, len(depths)))

    def blocks():
        yield first.images
        yield from rest

    shape = (first.images.shape[1], first.images.shape[2])
    return Planes(blocks(), shape, relative(first.origin), "fraction of the beam")


def require_writable(folder: pathlib.Path) -> None:
    """Try, before a long computation, whether its results can be written; leaves nothing behind.

    **Raises:** InputError where they cannot.
    """
    try:
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"-o {folder}: results cannot be written there ({error.strerror}); choose another "
            "folder."
        ) from error


def save(outcome: Outcome, folder: pathlib.Path) -> dict[str, Any]:
    """Write all four files; each appears complete or not at all. Returns the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = outcome.prepared.experiment
    seen, depths = view(outcome), section_depths(experiment)
    write_sections(
        seen, depths, experiment.sections, folder / "result.h5", folder / "sections.tif",
        contents(outcome, seen),
    )  # fmt: skip
    store.write_json(folder / "metrics.json", outcome.metrics)
    write_report(outcome, folder)
    return outcome.metrics


def write_sections(
    seen: View,
    depths: Float[np.ndarray, " z"],
    settings: Sections,
    path: pathlib.Path,
    tiff: pathlib.Path | None,
    tree: dict[str, Any] | None = None,
) -> None:
    """Stream sections to an HDF5 file and, if named, an ImageJ TIFF, with `tree` beside them."""
    made = planes(seen, depths, settings)
    step = seen.specimen.grid.sampling
    with section_writer(
        path, tiff, depths=depths, shape=made.shape, pixel_size=step, origin=made.origin
    ) as writer:
        for block in made.blocks:
            writer.write(np.asarray(block, np.float32))
        about = {"mode": settings.mode, "units": made.units}
        writer.attach(tree or {}, {"sections/phase": about})


def contents(outcome: Outcome, seen: View) -> dict[str, Any]:
    """Everything in `result.h5` but the sections, as nested facts and arrays."""
    model, specimen, detector = outcome.result.model, seen.specimen, seen.detector
    beams = isinstance(specimen, Beams)
    window = detector.window(seen.optics.wavelength)
    return {
        "specimen": {
            "waves": np.asarray(specimen.waves),
            "representation": "beams" if beams else "modes",
            "pixel_size_A": list(specimen.grid.sampling),
            "origin_A": list(specimen.origin),
            "reference_plane_A": specimen.plane,
            "cutoff_per_A": specimen.cutoff,
            "window": list(window.shape),
            "note": "s_h(r), tilt removed, both sides referred to the reference plane",
        },
        "optics": {
            "energy_ev": seen.optics.energy,
            "semiangle_mrad": seen.optics.semiangle,
            "aberrations_A": {k: np.asarray(v) for k, v in seen.optics.aberrations.items()},
            **_given(source_size_A=seen.optics.source, defocus_spread_A=seen.optics.spread),
        },
        "detector": {
            "shape": list(detector.shape),
            "pixel_mrad": detector.pixel,
            "integration": detector.integration,
            "offset_pixels": list(detector.offset),
            **_given(blur_pixels=detector.blur, background=detector.background),
        },
        "scan": {
            "positions_A": np.asarray(model.scan.positions),
            "series": np.asarray(model.scan.series),
            "dose": np.asarray(model.dose),
            "held_out": outcome.held_out,
            "shapes": np.asarray(outcome.dataset.scan_shapes),
        },
        "gauge": {
            "depth_A": seen.gauge.depth,
            "shift_A": list(seen.gauge.shift),
            "residual_rad": seen.gauge.residual,
        },
        "refined": {
            r.parameter.name: {
                "value": r.found,
                "path": r.path if not r.parameter.of_frames else r.found[None],
                "unit": r.parameter.unit,
                "held": r.parameter.held,
            }
            for r in outcome.refined
        },
        **structure(outcome, seen),
        **object_contents(model, seen.first),
        "history": {name: np.asarray(v) for name, v in outcome.result.history.items()},
        "provenance": provenance(outcome),
    }


def provenance(outcome: Outcome) -> dict[str, Any]:
    """What was asked for, of which files, with which versions."""
    experiment = outcome.prepared.experiment
    return {
        "config": to_yaml(experiment),
        "metrics": json.dumps(outcome.metrics),
        "notes": list(outcome.prepared.notes),
        "versions": versions(),
        "seed": experiment.method.seed,
        "inputs": [
            {"file": str(s.path), "sha256": _digest(s.path)} for s in outcome.prepared.sources
        ],
    }


def structure(outcome: Outcome, seen: View) -> dict[str, Any]:
    """The potential of the layers, where there are any, on the pixels of the sections."""
    if outcome.structure is None:
        return {}
    layers, own = settled(outcome.structure.model).specimen, seen.specimen
    pixels = np.subtract(own.origin, layers.origin) / own.grid.sampling
    (top, left), (y, x) = np.rint(pixels).astype(int).tolist(), own.grid.shape
    return {
        "structure": {
            "potential": np.asarray(layers.potential[:, top : top + y, left : left + x]),
            "z": np.asarray(layers.depths, float),
            "pixel_size_A": list(own.grid.sampling),
            "origin_A": np.subtract(own.origin, seen.first).tolist(),
            "units": "V Å",
            "history": {name: np.asarray(v) for name, v in outcome.structure.history.items()},
        }
    }


def _given(**leaves: Float[Array, ""] | None) -> dict[str, float]:
    """Those of the optional numbers that there are."""
    return {name: float(leaf) for name, leaf in leaves.items() if leaf is not None}


def versions() -> dict[str, str]:
    """Versions of this library and of those that compute."""
    return {name: importlib.metadata.version(name) for name in ("smpr3d_jax", "jax", "numpy")}


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_view(path: pathlib.Path) -> View:
    """The specimen of a `result.h5`, ready for other sections.

    **Raises:** InputError where the file holds no specimen of ours.
    """
    tree = store.load(path)
    missing = {"specimen", "optics", "detector", "scan", "gauge"} - set(tree)
    if missing:
        raise InputError(
            f"{path}: has no {sorted(missing)}; a result.h5 written by `smpr3d run` is needed."
        )
    about, lens, camera, gauge = (tree[k] for k in ("specimen", "optics", "detector", "gauge"))
    waves = jnp.asarray(about["waves"])
    y, x = about["pixel_size_A"]
    grid, origin = Grid(_pair(waves.shape[1:]), (y, x)), tuple(about["origin_A"])
    common = (origin, about["reference_plane_A"], about["cutoff_per_A"])
    if about["representation"] == "beams":
        window = Grid(_pair(about["window"]), (y, x))
        specimen: SMatrix = Beams(waves, grid, window, *common)
    else:
        specimen = TiltModes(waves, grid, *common)
    aberrations = {k: jnp.asarray(v) for k, v in lens["aberrations_A"].items()}
    detector = Detector(
        _pair(camera["shape"]),
        camera["pixel_mrad"],
        int(camera["integration"]),
        tuple(camera["offset_pixels"]),
    )
    first = tree["scan"]["positions_A"][0]
    return View(
        specimen,
        Optics(lens["energy_ev"], lens["semiangle_mrad"], aberrations),
        detector,
        Gauge(gauge["depth_A"], tuple(gauge["shift_A"]), gauge["residual_rad"]),
        (float(first[0]), float(first[1])),
    )


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    y, x = (int(n) for n in sizes)
    return y, x


def write_report(outcome: Outcome, folder: pathlib.Path) -> None:
    """`report.html` from the sections just written."""
    experiment, model = outcome.prepared.experiment, outcome.result.model
    positions = np.asarray(model.scan.positions, float) - np.asarray(model.scan.positions[0], float)
    (top, left), (bottom, right) = positions.min(0).tolist(), positions.max(0).tolist()
    box = (top, left, bottom, right)
    volume = store.load(folder / "result.h5", "sections")
    images, pixel, origin = finer(volume["phase"], volume["pixel_size_A"], volume["origin_A"], box)
    report_page(
        folder / "report.html",
        title=experiment.title or "Depth sections",
        subtitle=_subtitle(outcome),
        sections=images,
        depths=volume["z"],
        pixel_size=pixel,
        origin=origin,
        scan_box=box,
        history=outcome.result.history,
        frames=frame_pairs(outcome),
        settings=experiment.model_dump(mode="json"),
        numbers=_numbers(outcome),
        notes=outcome.prepared.notes,
        noise=outcome.metrics["noise_deviance_held_out"] or outcome.metrics["noise_deviance"],
        stopped=stopped(outcome),
        refined=[refined_facts(r) for r in outcome.refined if not r.parameter.of_frames],
        offsets=offsets(outcome),
        layers=_layers(outcome, folder, box),
    )


def _layers(outcome: Outcome, folder: pathlib.Path, box) -> dict[str, Any] | None:
    """The potential just written, for the eye, where there is one."""
    if outcome.structure is None:
        return None
    found = store.load(folder / "result.h5", "structure")
    place = (found["pixel_size_A"], found["origin_A"], box)
    return {"potential": finer(found["potential"], *place)[0], "z": found["z"]}


def stopped(outcome: Outcome) -> int | None:
    """The iteration whose model was kept, where a better one was waited for."""
    curve = outcome.result.history.get("deviance_held_out", [])
    waits = outcome.prepared.experiment.method.stop is not None
    return int(np.argmin(curve)) + 1 if waits and curve else None


def refined_facts(refined: Refined) -> dict[str, Any]:
    """One parameter as the report wants it."""
    shape, size = refined.found.shape, refined.found.size
    return {
        "name": refined.parameter.name,
        "unit": refined.parameter.unit if refined.parameter.unit != "1" else "",
        "start": np.broadcast_to(refined.parameter.start, shape).reshape(size),
        "found": refined.found.reshape(size),
        "history": refined.path.reshape(-1, size),
    }


def offsets(outcome: Outcome) -> dict[str, Any] | None:
    """How far positions were found from where the raster has them."""
    start, found = outcome.dataset.scan.positions, outcome.result.model.scan.positions
    if not any("scan.positions" in r.parameter.leaves() for r in outcome.refined):
        return None
    series = np.asarray(outcome.dataset.scan.series)
    return {"positions": np.asarray(start), "offsets": np.asarray(found - start), "series": series}


def finer(
    volume: Float[np.ndarray, "z y x"],
    pixel_size: float | Sequence[float],
    origin: Sequence[float],
    box: tuple[float, float, float, float],
    margin: float = 5.0,
    pixels: int = 200,
) -> tuple[Float[np.ndarray, "z v u"], list[float], list[float]]:
    """Sections for the eye: the scanned `box` and a margin (Å), Fourier-interpolated.

    The field is periodic and band-limited, so the interpolation adds nothing. The factor brings
    the longer side of the crop to about `pixels`. Returns images, pixel size and origin.
    """
    step = np.broadcast_to(np.asarray(pixel_size, float), 2)
    size = np.asarray(volume.shape[1:])
    low = np.maximum(np.floor((np.array(box[:2]) - margin - origin) / step), 0).astype(int)
    high = np.minimum(np.ceil((np.array(box[2:]) + margin - origin) / step) + 1, size).astype(int)
    factor = max(1, round(pixels / (high - low).max()))
    spectrum = np.fft.fftshift(np.fft.fft2(volume), axes=(1, 2))
    pad = [(0, 0)] + [(n * factor // 2 - n // 2, 0) for n in size]
    pad = [(a, 0 if i == 0 else size[i - 1] * (factor - 1) - a) for i, (a, _) in enumerate(pad)]
    wide = np.fft.ifft2(np.fft.ifftshift(np.pad(spectrum, pad), axes=(1, 2))).real * factor**2
    cut = tuple(slice(a * factor, b * factor) for a, b in zip(low, high, strict=True))
    corner = np.asarray(origin) + low * step
    return wide[(slice(None), *cut)].astype(np.float32), (step / factor).tolist(), corner.tolist()


def _subtitle(outcome: Outcome) -> str:
    method, scans = outcome.prepared.experiment.method, len(outcome.prepared.sources)
    what = f"{scans} scans" if scans > 1 else "one scan"
    kind = f"S-matrix in {method.representation}"
    if method.name != "smatrix":
        count = outcome.result.model.specimen.depths.shape[0]
        kind = f"Ptychography with {count} slice{'s' if count > 1 else ''}"
    return f"{kind} from {what}, smpr3d_jax {versions()['smpr3d_jax']}"


def _numbers(outcome: Outcome) -> dict[str, Any]:
    m, specimen = outcome.metrics, outcome.result.model.specimen
    sliced, ring = isinstance(specimen, ObjectSlices), m.get("ring_correlation")
    unknown = (
        {"Slices": specimen.depths.shape[0]}
        if sliced
        else {"Unknown waves": specimen.waves.shape[0]}
    )
    known = ring and ring["resolution_A"]
    agreement = {"Half-bit resolution": (round(known, 2), "Å")} if known else {}
    return {
        "Deviance per pixel, held out": m["deviance_held_out"],
        "Deviance per pixel, fitted": m["deviance"],
        "Deviance that noise allows": m["noise_deviance"],
        "R-factor, held out": m["r_factor_held_out"],
        "R-factor, fitted": m["r_factor"],
        **agreement,
        "Iterations": m["iterations"],
        "Time": (round(m["seconds"], 1), "s"),
        "Peak memory": (round((m["peak_memory_bytes"] or 0) / 2**30, 2), "GiB"),
        "Output plane (gauge)": (round(m["gauge_plane_A"], 2), "Å"),
        **unknown,
        "Electrons per frame": round(float(jnp.mean(outcome.result.model.dose)), 1),
    }


def frame_pairs(outcome: Outcome) -> list[dict[str, Any]]:
    """One held-out frame of each scan, beside what the model predicts for it."""
    model, dataset = outcome.result.model, outcome.dataset
    series = np.asarray(dataset.scan.series)
    pool = outcome.held_out if len(outcome.held_out) else np.arange(len(dataset))
    predict = jax.jit(lambda model, index: model(index))
    pairs = []
    for scan, defocus in enumerate(np.asarray(model.optics.defocus)):
        own = pool[series[pool] == scan]
        index = jnp.asarray(own[[len(own) // 2]], jnp.int32)
        kind = "held out" if len(outcome.held_out) else "fitted"
        pairs.append(
            {
                "label": f"defocus {defocus:.0f} Å, frame {int(index[0])} ({kind})",
                "data": np.asarray(dataset.counts[index].dense())[0],
                "model": np.asarray(predict(model, index))[0],
            }
        )
    return pairs
