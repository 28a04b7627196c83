"""The command `smpr3d`: each stage of the work is a command.

Exit status: 0 done, 2 the input cannot be used (nothing was written), 130 interrupted.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.counts import InputError
from ..data.readers import describe, read
from ..inverse.reconstruction import Step
from . import (
    calibrate as calibration,
    calibration_page,
    judgement,
    outputs,
    plan as planning,
    plan_tables,
    printing,
    simulate as simulation,
    workflow,
)
from .convert import Changes, convert, TARGETS
from .experiment import Experiment, from_mapping, load, override, template


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="3D phase contrast from 4D-STEM: S-matrix phase retrieval and depth sectioning.\n\n"
    "Lengths in Å, angles in mrad, energies in eV; z = 0 is where a scan of defocus 0 is focused, "
    "positive along the beam.",
)
notice = Console(stderr=True, highlight=False)

Out = Annotated[pathlib.Path, typer.Option("-o", "--output", help="Folder for the results.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the metrics as JSON on stdout.")]


@contextlib.contextmanager
def refusing(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Turn what is wrong with the input into a message and exit status 2."""
    try:
        yield
    except kinds as error:
        notice.print(f"[bold red]smpr3d:[/] {_escaped(error)}", soft_wrap=True)
        raise typer.Exit(2) from error


def _escaped(text: object) -> str:
    return str(text).replace("[", r"\[")


@app.command(epilog="Example: smpr3d run experiment.yaml -o results --iterations 30")
def run(
    experiment: Annotated[pathlib.Path, typer.Argument(help="Experiment file (YAML).")],
    output: Out,
    iterations: Annotated[
        int | None, typer.Option(help="Iterations, instead of the experiment's.", min=1)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of every random choice, instead of the experiment's.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Reconstruct a focal series and write sections, metrics and a report."""
    changes = {"method.iterations": iterations, "method.seed": seed}
    with refusing():
        changed = override(load(experiment), {k: v for k, v in changes.items() if v is not None})
    tell(reconstruct(changed, output, quiet), output, quiet, as_json)


def reconstruct(experiment: Experiment, output: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """The job of `run` and `demo`: every stage, with a progress bar unless `quiet`."""
    with jax.enable_x64(experiment.method.precision == "float64"):
        with refusing():
            prepared = workflow.prepare(experiment)
            dataset = workflow.load(prepared)
            outputs.require_writable(output)
        for note in () if quiet else prepared.notes:
            notice.print(f"[yellow]note:[/] {_escaped(note)}", soft_wrap=True)
        with refusing((InputError,)), progress(experiment.method.iterations, quiet) as callback:
            outcome = workflow.fit(prepared, dataset, callback)
        return outputs.save(outcome, output)


@contextlib.contextmanager
def progress(steps: int, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A bar with R-factor, held-out R-factor and deviance, and the time left."""
    if quiet:
        yield lambda step: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(), TextColumn("{task.fields[merit]}"),
    )  # fmt: skip
    with Progress(*columns, console=notice) as bar:
        task = bar.add_task("reconstructing", total=steps, merit="compiling")

        def callback(step: Step) -> None:
            last = {name: values[-1] for name, values in step.history.items()}
            merit = f"R {last['r_factor']:.4f}"
            if "deviance_held_out" in last:
                merit += f", held out R {last['r_factor_held_out']:.4f}"
                merit += f", deviance {last['deviance_held_out']:.4f}"
            bar.update(task, completed=step.number, merit=merit)

        yield callback


def tell(metrics: dict[str, Any], output: pathlib.Path, quiet: bool, as_json: bool) -> None:
    """Say where the results are and what they are worth."""
    if as_json:
        print(json.dumps(metrics, allow_nan=False))
    if not quiet:
        held = metrics["deviance_held_out"]
        worth = "" if held is None else f", held-out deviance {held:.4f} per pixel"
        notice.print(
            f"{metrics['iterations']} iterations in {metrics['seconds']:.0f} s, "
            f"R-factor {metrics['r_factor']:.4f}{worth}"
        )
        notice.print(f"Open {output / 'report.html'}", soft_wrap=True)


@app.command(epilog="Example: smpr3d info scan_0.h5 scan_1.h5 --defocus -150 --defocus 250")
def info(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Data files, one for each scan.")],
    dataset: Annotated[str | None, typer.Option(help="Path inside an HDF5 file.")] = None,
    scan_shape: Annotated[
        tuple[int, int] | None, typer.Option(help="Scan (slow fast) of a stack of frames.")
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Beam energy, eV.")] = None,
    semiangle: Annotated[float | None, typer.Option(help="Of the aperture, mrad.")] = None,
    defocus: Annotated[
        list[float] | None, typer.Option(help="Å, once for each file, in their order.")
    ] = None,
    scan_step: Annotated[float | None, typer.Option(help="Å.")] = None,
    detector_pixel: Annotated[float | None, typer.Option(help="Angle of a pixel, mrad.")] = None,
    as_json: Json = False,
) -> None:
    """Say what data files hold, and whether their series can be reconstructed.

    What the files do not say may be given; it wins over what they say.
    """
    said = {
        "beam.energy_ev": energy, "beam.semiangle_mrad": semiangle,
        "geometry.scan_step": scan_step, "geometry.detector_pixel_mrad": detector_pixel,
    }  # fmt: skip
    with refusing():
        hints = {"dataset": dataset, "scan_shape": scan_shape}
        given = {k: v for k, v in hints.items() if v is not None}
        sources = [read(file, **given) for file in files]
        spoken = {k: v for k, v in said.items() if v is not None}
        experiment = judgement.experiment_of(sources, spoken, defocus)
        known = [describe(source) for source in sources]
        electrons = [one["mean_electrons_per_frame"] for one in known]
        judged = judgement.judge(experiment, sources, electrons)
    if as_json:
        content = known[0] if len(known) == 1 else {"files": known}
        verdict = {
            "findings": [finding._asdict() for finding in judged.findings],
            "missing": list(judged.missing), "judged": judged.judged,
        }  # fmt: skip
        print(json.dumps(content | verdict, default=printing.plain))
        return
    for one in known:
        printing.describe_file(one)
        print()
    print("\n".join(judgement.words(judged)))


@app.command(epilog="Example: smpr3d calibrate scan_*.h5 --energy 80e3 --semiangle 25 -o new.yaml")
def calibrate(
    files: Annotated[list[pathlib.Path], typer.Argument(help="Scans of one series.")],
    output: Annotated[
        pathlib.Path, typer.Option("-o", "--output", help="Experiment file; a page appears beside.")
    ],
    energy: Annotated[float | None, typer.Option(help="Beam energy, eV.")] = None,
    semiangle: Annotated[float | None, typer.Option(help="Nominal semi-angle, mrad.")] = None,
    scan_step: Annotated[float | None, typer.Option(help="Scan step, Å.")] = None,
    lattice: Annotated[
        float | None,
        typer.Option(help="Spacing of a crystal in the images, Å: the scan step is measured."),
    ] = None,
    detector_pixel: Annotated[float | None, typer.Option(help="Angle of a pixel, mrad.")] = None,
    counts_per_electron: Annotated[
        float | None, typer.Option(help="Of an integrating camera; default: as the frames tell.")
    ] = None,
    defocus: Annotated[
        list[float] | None,
        typer.Option(help="Nominal defocus, Å, once for each scan: its sign, and where z = 0 is."),
    ] = None,
    rotation: Annotated[float | None, typer.Option(help="Rotation, degrees, if known.")] = None,
    transpose: Annotated[bool | None, typer.Option(help="Transposition, if known.")] = None,
    order: Annotated[int, typer.Option(help="Radial order of aberrations.", min=1, max=5)] = 1,
    dataset: Annotated[str | None, typer.Option(help="Path inside an HDF5 file.")] = None,
    scan_shape: Annotated[
        tuple[int, int] | None, typer.Option(help="Scan (slow fast) of a stack of frames.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure dose, step, camera length, rotation, foci and aberrations; write an experiment."""
    hints = {"dataset": dataset, "scan_shape": scan_shape}
    with refusing():
        calibration_page.require_writable(output)
        found = calibration.calibrate(
            files, energy=energy, semiangle=semiangle, scan_step=scan_step, lattice=lattice,
            detector_pixel=detector_pixel, counts_per_electron=counts_per_electron,
            defoci=defocus, rotation_deg=rotation, transpose=transpose, order=order,
            hints={name: value for name, value in hints.items() if value is not None},
        )  # fmt: skip
        page = calibration_page.write(found, output)
    if quiet:
        return
    for note in found.notes:
        notice.print(f"[yellow]note:[/] {_escaped(note)}", soft_wrap=True)
    for line in calibration_page.lines(found):
        notice.print(_escaped(line), soft_wrap=True)
    notice.print(f"Look at {page}, then: smpr3d run {output} -o results", soft_wrap=True)


@app.command(
    epilog="Example: smpr3d design --energy 300e3 --cc 1.2 --energy-spread 0.4 --c5 5 "
    "--thickness 200 --detector 192 192 --dose 2e4 -o plan"
)
def design(
    energy: Annotated[float, typer.Option(help="Beam energy, eV.")],
    semiangle: Annotated[
        float | None, typer.Option(help="Semi-angle to judge, mrad; default: the optimum.")
    ] = None,
    thickness: Annotated[float | None, typer.Option(help="Of the specimen, Å.")] = None,
    cc: Annotated[float | None, typer.Option(help="Chromatic aberration, mm.")] = None,
    energy_spread: Annotated[float | None, typer.Option(help="Full width at half, eV.")] = None,
    c3: Annotated[float | None, typer.Option(help="Of a lens without corrector, mm.")] = None,
    c5: Annotated[float | None, typer.Option(help="Of a lens with corrector, mm.")] = None,
    aberration: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE that remains, e.g. C12=20; Å, rad.")
    ] = None,
    source: Annotated[
        float | None, typer.Option(help="Source size on the specimen, Å rms.")
    ] = None,
    detector: Annotated[tuple[int, int] | None, typer.Option(help="Pixels, ky kx.")] = None,
    detector_pixel: Annotated[float | None, typer.Option(help="Angle of a pixel, mrad.")] = None,
    representation: Annotated[str, typer.Option(help="modes or beams.")] = "modes",
    scans: Annotated[int, typer.Option(help="Number of foci.", min=1)] = 4,
    step: Annotated[float | None, typer.Option(help="Scan step, Å.")] = None,
    field: Annotated[tuple[float, float] | None, typer.Option(help="Scanned, y x, Å.")] = None,
    dose: Annotated[float | None, typer.Option(help="Electrons per Å² and scan.")] = None,
    dwell: Annotated[float | None, typer.Option(help="Time of a frame, s.")] = None,
    output: Annotated[
        pathlib.Path | None, typer.Option("-o", "--output", help="Folder for picture and plan.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Plan a focal series: the best aperture, its limits, foci, detector, step, dose and data."""
    with refusing():
        microscope = planning.Microscope(
            energy, cc, energy_spread, c3, c5, source, _pairs(aberration or [])
        )
        found = planning.design(
            microscope, semiangle, thickness=thickness, detector_shape=detector,
            detector_pixel=detector_pixel, representation=representation, scans=scans,
            scan_step=step, field=field, dose=dose, dwell=dwell,
        )  # fmt: skip
        written = plan_tables.write(found, output) if output else ()
    if as_json:
        print(json.dumps(plan_tables.facts(found), allow_nan=False))
    else:
        printing.show_tables(plan_tables.tables(found))
        printing.tell_findings(found.findings)
    for path in written:
        notice.print(f"wrote {path}", soft_wrap=True)


@app.command(
    epilog="Example: smpr3d section results/result.h5 --from 0 --to 120 --step 2 -o fine.h5"
)
def section(
    result: Annotated[pathlib.Path, typer.Argument(help="result.h5 of a run.")],
    start: Annotated[float, typer.Option("--from", help="First depth, Å.")],
    stop: Annotated[float, typer.Option("--to", help="Last depth, Å.")],
    step: Annotated[float, typer.Option("--step", help="Distance of the planes, Å.")],
    output: Annotated[
        pathlib.Path, typer.Option("-o", "--output", help="HDF5 file; a .tif appears beside it.")
    ],
    mode: Annotated[
        str, typer.Option(help="confocal, tilt_mean, scem, bright_field or annular.")
    ] = "confocal",
    inner: Annotated[float | None, typer.Option(help="Inner angle of annular, mrad.")] = None,
    outer: Annotated[
        float | None, typer.Option(help="Outer angle of annular or bright_field, mrad.")
    ] = None,
    collector: Annotated[
        float | None, typer.Option(help="Largest outgoing angle used, mrad.")
    ] = None,
) -> None:
    """Make other depth sections of a finished reconstruction."""
    with refusing():
        tiff = _beside(result, output)
        given = {
            "start": start, "stop": stop, "step": step, "mode": mode, "inner_mrad": inner,
            "outer_mrad": outer, "collector_mrad": collector,
        }  # fmt: skip
        wanted = {k: v for k, v in given.items() if v is not None}
        asked = from_mapping({"scans": [{"file": str(result)}], "sections": wanted}, "section")
        depths = start + step * np.arange(int(np.floor((stop - start) / step + 1e-6)) + 1)
        outputs.write_sections(outputs.load_view(result), depths, asked.sections, output, tiff)
    notice.print(f"{len(depths)} planes in {output}", soft_wrap=True)


def _beside(result: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """Where the TIFF goes: beside `output`, which must not be the result itself."""
    tiff = output.with_suffix(".tif")
    if tiff == output or output.resolve() == result.resolve():
        raise ValueError(
            f"-o {output}: name an HDF5 file other than {result}, such as sections.h5; the TIFF "
            "appears beside it."
        )
    return tiff


@app.command(epilog="Example: smpr3d demo -o demo; then open demo/report.html")
def demo(
    output: Out = pathlib.Path("demo"),
    iterations: Annotated[int, typer.Option(help="Iterations.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Seed of noise and held-out positions.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Simulate two crossing nanotubes 90 Å apart in depth, and tell them apart.

    Writes a focal series of four scans with Poisson noise into OUT/data, then does with it what
    `smpr3d run` does. A few minutes on a laptop.
    """
    with refusing():
        outputs.require_writable(output)
    if not quiet:
        notice.print("simulating a focal series of two crossing nanotubes")
    series = simulation.simulate(simulation.two_nanotubes(), simulation.Acquisition(seed=seed))
    file = simulation.write_series(output / "data", series, "Two nanotubes, 90 Å apart in depth")
    changed = override(load(file), {"method.iterations": iterations, "method.seed": seed})
    tell(reconstruct(changed, output, quiet), output, quiet, as_json)


@app.command(
    epilog="Example: smpr3d simulate -o series --structure crystal.cif --defocus -100 "
    "--defocus 100 --dose 1e5 --aberration C12=20 --aberration phi12=0.4"
)
def simulate(
    output: Out,
    structure: Annotated[
        pathlib.Path | None,
        typer.Option(help="Structure that ASE reads, z along the beam; default: two nanotubes."),
    ] = None,
    energy: Annotated[float, typer.Option(help="Beam energy, eV.")] = 80e3,
    semiangle: Annotated[float, typer.Option(help="Semi-angle of the aperture, mrad.")] = 25.0,
    defocus: Annotated[
        list[float] | None,
        typer.Option(help="Å, once for each scan; positive is below z = 0. [-150 0 100 250]"),
    ] = None,
    scan: Annotated[tuple[int, int], typer.Option(help="Positions (slow fast).")] = (24, 24),
    step: Annotated[float, typer.Option(help="Scan step, Å.")] = 0.4,
    dose: Annotated[float, typer.Option(help="Electrons per Å² and scan.")] = 1e5,
    jitter: Annotated[float, typer.Option(help="Scan noise, Å rms along each axis.")] = 0.0,
    aberration: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, e.g. C12=20; Å, angles phi.. in rad.")
    ] = None,
    detector_angle: Annotated[float, typer.Option(help="Half width of the camera, mrad.")] = 42.0,
    seed: Annotated[int, typer.Option(help="Seed of noise and jitter.")] = 0,
) -> None:
    """Write a simulated focal series, its truth and an experiment file that `run` takes."""
    with refusing():
        atoms = simulation.read_structure(structure) if structure else simulation.two_nanotubes()
        how = simulation.Acquisition(
            energy=energy, semiangle=semiangle, aberrations=_pairs(aberration or []),
            defocus=tuple(defocus or (-150.0, 0.0, 100.0, 250.0)), scan_shape=scan, scan_step=step,
            dose=dose, jitter=jitter, detector_angle=detector_angle, seed=seed,
        )  # fmt: skip
        outputs.require_writable(output)
        series = simulation.simulate(atoms, how)
        title = "two nanotubes" if structure is None else structure.stem
        file = simulation.write_series(output, series, f"{title}, simulated")
    notice.print(f"Reconstruct it with: smpr3d run {file} -o {output / 'results'}", soft_wrap=True)


@app.command(name="convert", epilog="Example: smpr3d convert scan.h5 scan.toml --bin 2")
def convert_(
    file: Annotated[pathlib.Path, typer.Argument(help="A data file of a known format.")],
    output: Annotated[pathlib.Path, typer.Argument(help="The file to write.")],
    to: Annotated[
        str | None, typer.Option(help=f"{', '.join(TARGETS)}; default: as OUTPUT ends.")
    ] = None,
    crop: Annotated[tuple[int, int] | None, typer.Option(help="Pixels (rows columns).")] = None,
    center: Annotated[
        tuple[int, int] | None, typer.Option(help="Pixel in the middle of the crop. [n//2]")
    ] = None,
    bin: Annotated[int, typer.Option(help="Add up N × N pixels.", min=1)] = 1,
    scan_window: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="First row, last row + 1, first column, last column + 1 of the scan."),
    ] = None,
    scan_bin: Annotated[int, typer.Option(help="Add up N × N positions.", min=1)] = 1,
    dataset: Annotated[str | None, typer.Option(help="Path inside an HDF5 file.")] = None,
    scan_shape: Annotated[
        tuple[int, int] | None, typer.Option(help="Scan (slow fast) of a stack of frames.")
    ] = None,
    frame_shape: Annotated[
        tuple[int, int] | None, typer.Option(help="Frame (rows columns), where not known.")
    ] = None,
    drop_flyback: Annotated[
        bool, typer.Option("--drop-flyback", help="Leave out the last column of stempy's scan.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUTPUT.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a data file in another format, cropped and binned, keeping every electron."""
    hints = {
        "dataset": dataset, "scan_shape": scan_shape, "frame_shape": frame_shape,
        "drop_flyback": drop_flyback or None,
    }  # fmt: skip
    changes = Changes(scan_window, crop, center, bin, scan_bin)
    with refusing(), Progress(console=notice, disable=quiet, transient=True) as bar:
        task = bar.add_task("converting", total=1.0)
        source = read(file, **{k: v for k, v in hints.items() if v is not None})
        tell_done = lambda done: bar.update(task, completed=done)
        made = convert(source, output, to, changes, force, tell_done)
    for note in () if quiet else made.notes:
        notice.print(f"[yellow]note:[/] {_escaped(note)}", soft_wrap=True)
    if not quiet:
        shapes = " × ".join(str(n) for n in (*made.scan_shape, *made.frame_shape))
        notice.print(f"{made.path}: {made.format}, {shapes}", soft_wrap=True)


def _pairs(words: list[str]) -> dict[str, float]:
    """NAME=VALUE words as a mapping."""
    pairs = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            pairs[name] = float(value)
        except ValueError:
            raise ValueError(f"--aberration {word}: write NAME=VALUE, such as C12=20.") from None
    return pairs


@app.command(name="template", epilog="Example: smpr3d template > experiment.yaml")
def template_() -> None:
    """Print an experiment file with every key and what it means."""
    print(template(), end="")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
