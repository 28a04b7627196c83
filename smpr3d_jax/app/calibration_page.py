"""What `calibrate` leaves: the experiment file, and beside it a page of pictures."""

import io
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ruamel.yaml import YAML

from ..data.calibration import power_spectrum
from ..inverse import dpc
from ..inverse.brightfield import BrightField
from ..inverse.parallax import parallax
from ..inverse.rasters import Raster
from ..inverse.ssb import ssb
from ..physics.optics import Optics, wavelength
from ..physics.scan import raster
from ..report import calibration as figures, store
from ..report.pictures import Picture, picture_page
from .calibrate import Calibration


def write(found: Calibration, experiment: pathlib.Path) -> pathlib.Path:
    """Write the experiment file and the page beside it, `<name>_calibration.html`; its path."""
    page = experiment.with_name(f"{experiment.stem}_calibration.html")
    picture_page(
        page, title=f"Calibration of {found.experiment.title}", subtitle=_subtitle(found),
        numbers=_numbers(found), notes=found.notes, pictures=_pictures(found),
    )  # fmt: skip
    with store.replacing(experiment) as temporary:
        temporary.write_text(experiment_text(found, experiment.parent), encoding="utf-8")
    return page


def experiment_text(found: Calibration, folder: pathlib.Path) -> str:
    """The experiment file to be put into `folder`, with standard errors and notes at its head."""
    text, writer = io.StringIO(), YAML()
    writer.default_flow_style, writer.width = None, 120
    beside = lambda file: os.path.relpath(file, folder.resolve())
    scans = [scan | {"file": beside(scan["file"])} for scan in found.content["scans"]]
    writer.dump(found.content | {"scans": scans}, text)
    sigma = found.lens.sigma
    errors = [
        "# Written by smpr3d calibrate. Standard errors, from what the fit leaves unexplained:",
        f"#   rotation {math.degrees(float(sigma.rotation)):.2g}°, defoci "
        + ", ".join(f"{float(s):.2g}" for s in sigma.aberrations["C10"])
        + f" Å, centre {found.discs[0].center_sigma:.2g} pixels.",
        f"#   {_step_words(found)}; {_electron_words(found)}.",
    ]
    errors += [f"# Note: {note}" for note in found.notes]
    return "\n".join(errors) + "\n" + text.getvalue()


def require_writable(experiment: pathlib.Path) -> None:
    """Refuse, before anything is measured, a path where no file can be written.

    **Raises:** ValueError if it is a folder, or lies in one that does not exist.
    """
    if experiment.is_dir() or not experiment.resolve().parent.is_dir():
        what = "is a folder" if experiment.is_dir() else "lies in a folder that does not exist"
        raise ValueError(f"-o {experiment}: {what}; give the path of a new experiment file.")


def lines(found: Calibration) -> list[str]:
    """The result in a few lines."""
    lens, sigma = found.lens.lens, found.lens.sigma
    errors = np.asarray(sigma.aberrations["C10"], float)
    defoci = ", ".join(f"{f:.5g} ± {s:.2g}" for f, s in zip(found.defoci, errors, strict=True))
    others = ", ".join(f"{name} {value:.4g}" for name, value in found.aberrations.items())
    return [
        *_dose_lines(found),
        f"disc centre {found.center[0]:.2f}, {found.center[1]:.2f}; detector pixel "
        f"{found.pixel:.5g} mrad, semi-angle {found.semiangle:.4g} mrad",
        f"rotation {math.degrees(float(lens.rotation)) % 360:.2f} ± "
        f"{math.degrees(float(sigma.rotation)):.2g}°, {'' if found.lens.transpose else 'not '}"
        f"transposed; sign decided by {found.lens.decided}",
        f"defocus {defoci} Å" + (f"; {others} (Å, rad)" if others else ""),
    ]


def _dose_lines(found: Calibration) -> list[str]:
    """What an electron is worth, the step, and the dose that follows."""
    (dose, error), (area, area_error) = found.dose, found.dose_per_area
    what = "electrons" if found.electrons.sure else "counts"
    told = (
        f"dose {dose:.5g} ± {error:.2g} {what} a frame, {area:.4g} ± {area_error:.2g} "
        f"{what}/Å² a scan"
    )
    worth = found.electrons.counts_per_electron
    if not found.electrons.sure and math.isfinite(worth):
        told += f"; about {dose / worth:.2g} electrons a frame, {area / worth:.2g}/Å²"
    return [_electron_words(found), _step_words(found), told]


def _electron_words(found: Calibration) -> str:
    """What an electron makes of the counts."""
    worth, charge = found.electrons, found.electrons.charge
    if worth.divided_by is not None:
        error = "" if math.isnan(worth.error) else f" ± {worth.error:.1g}"
        return f"frames are divided by {worth.divided_by:.5g}{error} counts per electron"
    if worth.sure:
        return f"counts are electrons ({charge.reason})"
    if math.isnan(worth.counts_per_electron):
        return "what an electron is worth is not known"
    return f"an electron makes about {worth.counts_per_electron:.2g} counts, not divided"


def _step_words(found: Calibration) -> str:
    y, x = found.known.scan_step
    if found.step is None:
        return f"scan step {y:g}" + (f", {x:g}" if x != y else "") + " Å, as given"
    told = f"{y:.5g} ± {found.step.sigma[0]:.2g}"
    told += f", {x:.5g} ± {found.step.sigma[1]:.2g}" if x != y else ""
    return f"scan step {told} Å, from the lattice"


def _subtitle(found: Calibration) -> str:
    files = ", ".join(source.path.name for source in found.sources)
    return f"{files}; {found.known.energy / 1e3:g} kV"


def _numbers(found: Calibration) -> dict[str, Any]:
    """The key numbers, in the order of the page."""
    source, lens = found.sources[0], found.lens
    (dose, error), (area, area_error) = found.dose, found.dose_per_area
    what, worth = "electrons" if found.electrons.sure else "counts", found.electrons
    step, sigma = found.known.scan_step, found.step.sigma if found.step else (math.nan,) * 2
    numbers: dict[str, Any] = {
        "scan": f"{source.scan_shape[0]} × {source.scan_shape[1]}",
        "frame": f"{source.frame_shape[0]} × {source.frame_shape[1]}",
        f"{what} a frame": (dose, f"± {error:.2g}"),
        f"{what} per Å²": (area, f"± {area_error:.2g} Å⁻²"),
        "counts an electron": (worth.counts_per_electron, _error(worth.error))
        if math.isfinite(worth.counts_per_electron)
        else "not known",
        "scan step": (step[0], f"{_error(sigma[0])} Å".strip()),
        "disc centre": f"{found.center[0]:.2f}, {found.center[1]:.2f}",
        "disc radius": (float(np.mean([disc.radius for disc in found.discs])), "pixels"),
        "detector pixel": (found.pixel, "mrad"),
        "semi-angle": (found.semiangle, "mrad"),
        "rotation": (math.degrees(float(lens.lens.rotation)) % 360, "°"),
        "transposed": bool(lens.transpose),
    }
    if step[0] != step[1]:
        numbers["scan step, fast"] = (step[1], f"{_error(sigma[1])} Å".strip())
    for i, (defocus, sigma) in enumerate(
        zip(found.defoci, np.asarray(lens.sigma.aberrations["C10"]), strict=True)
    ):
        name = "defocus" if len(found.defoci) == 1 else f"defocus {i}"
        numbers[name] = (float(defocus), f"± {float(sigma):.2g} Å")
    for name, value in found.aberrations.items():
        numbers[name] = (value, "rad" if name.startswith("phi") else "Å")
    numbers["explained"] = (100 * lens.explains, "% of the images")
    numbers["λ/α²"] = (wavelength(found.known.energy) / (found.semiangle * 1e-3) ** 2, "Å")
    numbers["sign decided by"] = lens.decided
    return numbers


def _error(sigma: float) -> str:
    return "" if math.isnan(sigma) or sigma == 0 else f"± {sigma:.2g}"


def _evidence(found: Calibration) -> list[Picture]:
    """What the counts of an electron and the scan step were read from."""
    worth, pictures = found.electrons, []
    if len(worth.charge.points):
        title = "What an electron makes of the counts"
        caption = (
            f"{worth.charge.reason}. Left: the noise of pixels; it lies below the blue line where "
            "charge spreads. Right: how many pixels hold which count."
        )
        points, values = worth.charge.points, worth.charge.values
        shown = figures.electrons(points, values, worth.counts_per_electron, worth.sure)
        pictures.append(Picture(title, caption[0].upper() + caption[1:], shown))
    if found.step is not None:
        seen = found.step.lattices
        shown = figures.lattice(
            [one.image for one in seen], [power_spectrum(one.image) for one in seen],
            [one.found.peaks for one in seen],
            [f"{found.sources[one.scan].path.name}: {one.name}" for one in seen],
        )  # fmt: skip
        caption = "The image that shows it best, and its power spectrum; circles: the peaks used."
        pictures.append(Picture("Lattice", caption, shown))
    return pictures


def _pictures(found: Calibration) -> list[Picture]:
    radius = float(np.mean([disc.radius for disc in found.discs]))
    first = -float(found.lens.lens.aberrations["C10"][0])
    pictures = _evidence(found) + [
        Picture(
            "Bright-field disc",
            "Mean pattern (square root), points of half intensity, fitted circle.",
            figures.discs(
                [seen.pattern for seen in found.surveys], [disc.center for disc in found.discs],
                radius, [disc.edge for disc in found.discs], [disc.used for disc in found.discs],
            ),
        ),
        Picture(
            "Search for rotation and defocus",
            "Part of the bright-field images of the first scan that a weak object explains. One "
            "sharp maximum is what you want; the circle is the end of the fit.",
            figures.search(
                found.lens.map, found.lens.rotations, found.lens.defoci,
                (float(found.lens.lens.rotation) % (2 * math.pi), first),
            ),
        ),
    ]  # fmt: skip
    for i, pair in enumerate(found.shifts):
        if pair is not None:
            pictures.append(_displacement(found, i, *pair))
    for i, signals in enumerate(found.signals):
        bright = bright_field(found, i)
        # Out of focus the images of the cells lie beside each other, and together are finer.
        finer = 2 if found.shifts[i] is not None else 1
        aligned = parallax(bright, correction="flip", upsample=finer).images[0]
        shown = {
            "bright field": signals.images.sum(-1),
            "outside the disc": signals.dark,
            "phase from the centre of mass (rad)": deflection_phase(found, i),
            "aligned bright field": np.asarray(aligned),
            "single sidebands (rad)": np.asarray(ssb(bright, upsample=finer).images[0]),
        }
        pictures.append(
            Picture(
                f"Images of {found.sources[i].path.name}",
                "The last three should show one structure, light where there is matter.",
                figures.images(shown, _field(found)),
            )
        )
    return pictures


def _displacement(found: Calibration, i: int, shifts, fit) -> Picture:
    basis = np.concatenate([shifts.cells, np.ones((len(shifts.cells), 1))], 1)
    linear = np.linalg.lstsq(basis[shifts.used], shifts.moved[shifts.used], rcond=None)[0]
    return Picture(
        f"Displacements of the bright-field images, {found.sources[i].path.name}",
        f"From them alone: defocus {abs(fit.defocus):.5g} ± {fit.defocus_sigma:.2g} Å (size), "
        f"rotation {math.degrees(fit.rotation):.2f}° modulo 180°, C12 "
        f"{math.hypot(fit.C12a, fit.C12b):.4g} Å; residual {fit.residual:.2g} Å.",
        figures.displacements(shifts.cells, shifts.moved, shifts.used, basis @ linear),
    )


def _field(found: Calibration) -> tuple[float, float]:
    """Size of the scanned field along the raster's axes, Å."""
    ny, nx = (
        n * d for n, d in zip(found.sources[0].scan_shape, found.known.scan_step, strict=True)
    )
    return ny, nx


def _raster(found: Calibration) -> Raster:
    """The raster at the calibrated rotation and transposition."""
    shape = found.sources[0].scan_shape
    turn, transpose = float(found.lens.lens.rotation), found.lens.transpose
    place = raster(shape, found.known.scan_step, turn, transpose).reshape(*shape, 2)
    pair = lambda v: (float(v[0]), float(v[1]))
    slow, fast = place[1, 0] - place[0, 0], place[0, 1] - place[0, 0]
    return Raster(shape, (0.0, 0.0), pair(slow), pair(fast))


def bright_field(found: Calibration, scan: int) -> BrightField:
    """The images of the cells of one scan, seen through the lens that was found for it."""
    signals, lam = found.signals[scan], wavelength(found.known.energy)
    scale = found.pixel * 1e-3 / lam
    level = signals.images.mean((0, 1)) / signals.cell_pixels
    images = np.moveaxis(signals.images / signals.cell_pixels, -1, 0)
    lens = {name: value[scan : scan + 1] for name, value in found.lens.lens.aberrations.items()}
    optics = Optics(found.known.energy, found.semiangle, lens)
    side = math.sqrt(float(np.median(signals.cell_pixels))) * scale
    return BrightField(
        jnp.asarray(images, jnp.float32), jnp.asarray(signals.cells * scale, jnp.float32),
        jnp.asarray(np.median(level), jnp.float32), _raster(found), optics, side,
    )  # fmt: skip


def deflection_phase(found: Calibration, scan: int) -> Float[np.ndarray, "scan_y scan_x"]:
    """Phase (rad) from the centre of mass of a scan, at the calibrated rotation."""
    signals, lattice = found.signals[scan], _raster(found)
    field = dpc.Deflection(
        jnp.asarray(signals.com * found.pixel, float),
        jnp.asarray(signals.electrons, float),
        lattice,
    )
    # Slower variations than half of the field are noise and descan.
    slowest = 0.5 / max(n * d for n, d in zip(lattice.shape, lattice.step, strict=True))
    flat = dpc.levelled(field, plane=True)
    return np.asarray(dpc.integrated(flat, found.known.energy, damping=slowest))
