"""What joint refinement brings: each parameter against the truth, sections, deviance, and its time.

    python benchmarks/refinement.py [--data FOLDER] [--only NAME ...] [--iterations N] [--json FILE]

Every case is a whole reconstruction by the defaults of an experiment file that is told less than
the truth, or of few electrons. Cases on `nanotubes_misaligned` (an independent simulation,
positions 0.3 Å rms wrong, C12 30 Å, C21 300 Å, relative defoci up to 18 Å wrong) and on
`nanotubes_series` need the folder of shared data with its scorer `evaluate.py`; the others are
simulated here. Records have the keys `case`, `positions_A` (rms error along an axis, common shift
removed; `fitted` and `held_out` frames), `defocus_A` (largest error of a relative defocus),
`C12_A`, `C21_A` (size of the vector of errors),
`rotation_deg`, `camera_length` (errors), `own`, `width_A`, `deviance_held_out`,
`noise_deviance_held_out`, `seconds`, `iterations`; what a case does not have is null or missing.
`positions_at_best_A` is what Fisher information of the counts and a prior as wide as the truth
leave of the positions' error where all else is known, the specimen being the one found, whose noise
counts as structure: too hopeful where electrons are few. The case "an iteration" times single steps
(least core seconds of some, taken in turn) and weighs them by how often the defaults take them.
"""

import argparse
import collections
import dataclasses
import importlib.util
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ase
import equinox as eqx
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
from smatrix import write

import smpr3d_jax as sj
from smpr3d_jax.inverse.batches import ordered


MISALIGNED, ALIGNED = "nanotubes_misaligned", "nanotubes_series"
TOLD = (-150.0, 0.0, 100.0, 250.0)
TRUE = (-150.0, 14.0, 88.0, 268.0)
# The truth counts angles from the first array axis; ours are from x towards y.
LENS = {"C12": 30.0, "phi12": np.pi / 2 - 0.6, "C21": 300.0, "phi21": np.pi / 2 - 0.2}
REFINED = ("positions", "defocus", "C12", "C21")
ITERATION = "an iteration"


class Truth(NamedTuple):
    """What the microscope really did."""

    positions: np.ndarray
    defocus: tuple[float, ...]
    lens: dict[str, float]
    rotation: float = 0.0
    camera_length: float = 0.0


class Case(NamedTuple):
    """An experiment, the truth about it, and how sections are scored (None: not)."""

    experiment: Any
    truth: Truth
    score: Callable[[sj.workflow.Outcome], dict[str, float]] | None
    thin: float = 1.0
    told: bool = False
    events: bool = False
    layers: tuple[float, ...] = ()


def misaligned(data: pathlib.Path, defocus=TOLD, lens=None, refine=()) -> Case:
    """The shared series under an experiment that is told so much."""
    tree = {
        "beam": {"aberrations": lens or {}},
        "geometry": {"detector_pixel_mrad": 2.0879, "halo": True},
        "refine": list(refine),
        "sections": {"stop": 165.0},
    }
    how = {"scan_shape": (32, 32), "scan_step": 0.4}
    return shared(data, data / MISALIGNED, defocus, tree, TRUE, LENS, how)


def few_electrons(data: pathlib.Path, events: bool = False, **method) -> Case:
    """The series of a perfect microscope, thinned to 1,000 electrons a frame."""
    tree = {
        "geometry": {"detector_pixel_mrad": 1.7399},
        "method": method,
        "sections": {"stop": 180.0},
    }
    case = shared(data, data / ALIGNED, TOLD, tree, TOLD, {}, {})
    return case._replace(thin=1000 / 15980, events=events)


def shared(
    data: pathlib.Path, folder: pathlib.Path, told, tree: dict[str, Any], true, lens, how
) -> Case:
    """Four scans of two nanotubes under what `tree` says beside what all such series have."""
    common = {
        "beam": {"energy_ev": 80e3, "semiangle_mrad": 25.0},
        "scans": [{"file": str(folder / f"scan_{i}.h5"), "defocus": d} for i, d in enumerate(told)],
        "geometry": {"scan_step": 0.4},
        "sections": {"start": -40.0, "step": 5.0},
    }
    parts = ("beam", "geometry", "sections")
    merged = common | tree | {key: common[key] | tree.get(key, {}) for key in parts}
    with h5py.File(folder / "truth.h5") as file:
        positions = np.asarray(file["positions_A"]).reshape(-1, 2)
    score = lambda outcome: tubes(outcome, data, folder, how)
    return Case(sj.experiment.from_mapping(merged), Truth(positions, true, lens), score)


def tubes(
    outcome: sj.workflow.Outcome, data: pathlib.Path, folder: pathlib.Path, how: dict[str, Any]
) -> dict:
    """The scorer's figures of the worse of the two tubes; `how` is what it is told of the scan."""
    spec = importlib.util.spec_from_file_location("evaluate", data / "evaluate.py")
    assert spec is not None and spec.loader is not None
    scorer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scorer)
    seen = sj.outputs.view(outcome)
    depths = sj.experiment.section_depths(outcome.prepared.experiment)
    sections = sj.depth_sections(seen.specimen, seen.optics.energy, depths, gauge=seen.gauge)
    merits = scorer.evaluate(
        np.asarray(sections), depths, seen.specimen.grid.sampling[0],
        np.subtract(seen.specimen.origin, seen.first), folder / "truth.h5",
        max_shift=0.5, **how,
    )  # fmt: skip
    return {
        "own": min(merits["band"][f"{which}_own"] for which in ("upper", "lower")),
        "width_A": max(merits[f"amp_{which}_fwhm"] for which in ("upper", "lower")),
    }


def heavy_atoms() -> ase.Atoms:
    """Gold and carbon on two planes 80 Å apart: more than 2 rad behind an atom of gold."""
    rng = np.random.default_rng(7)
    places, symbols, tags = [], [], []
    for tag, depth in enumerate((12.0, 92.0)):
        for symbol, count in (("Au", 5), ("C", 30)):
            xy = rng.uniform(8.0, 20.0, (count, 2))
            places += [(x, y, depth + rng.normal(0, 0.3)) for x, y in xy]
            symbols += [symbol] * count
            tags += [tag] * count
    return ase.Atoms(symbols, places, cell=[28.0, 28.0, 104.0], tags=tags)


def simulated(folder: pathlib.Path, atoms, changes: dict, refine, geometry=None) -> Case:
    """A series made here, and an experiment told other foci and no aberrations."""
    truth = sj.Acquisition(**changes)
    series = sj.simulate(atoms, truth)
    file = sj.write_series(folder, series, "simulated")
    told = sj.experiment.load(file)
    shift = dict(zip(range(4), (0.0, -14.0, 12.0, -18.0), strict=True))
    wrong = {f"scans[{i}].defocus": d + shift[i] for i, d in enumerate(truth.defocus)}
    wrong |= {"beam.aberrations": {}, "refine": list(refine)} | (geometry or {})
    with h5py.File(folder / "truth.h5") as file:
        positions = np.asarray(file["positions_A"]).reshape(-1, 2)
    lens = {name: float(value) for name, value in truth.aberrations.items()}
    rotation = -float((geometry or {}).get("geometry.rotation_deg", 0.0))
    pixel = told.geometry.detector_pixel_mrad
    wrong_pixel = (geometry or {}).get("geometry.detector_pixel_mrad", pixel)
    camera = pixel / wrong_pixel - 1
    return Case(
        sj.experiment.override(told, wrong),
        Truth(positions, truth.defocus, lens, rotation, camera), None,
    )  # fmt: skip


def run(case: Case, iterations: int | None, seed: int = 0) -> dict[str, Any]:
    """One whole reconstruction, judged."""
    experiment = case.experiment
    if iterations:
        experiment = sj.experiment.override(experiment, {"method.iterations": iterations})
    prepared = sj.workflow.prepare(experiment)
    dataset = sj.workflow.load(prepared)
    if case.thin < 1:
        kept, _ = sj.thin(dataset.counts, case.thin, seed)
        if case.events and isinstance(kept, sj.Frames):
            kept = sj.events_from_frames(kept)
        dataset = dataclasses.replace(dataset, counts=kept)
    if case.told:
        scan = sj.Scan(_placed(case.truth.positions, dataset.scan.positions), dataset.scan.series)
        dataset = dataclasses.replace(dataset, scan=scan)
    if case.layers:
        outcome = through_layers(case, prepared, dataset)
    else:
        outcome = sj.workflow.fit(prepared, dataset)
    metrics = outcome.metrics
    found = errors(outcome, case.truth) | (case.score(outcome) if case.score else {})
    names = ("deviance_held_out", "noise_deviance_held_out", "seconds", "iterations")
    return found | {name: metrics[name] for name in names}


def through_layers(
    case: Case, prepared: sj.workflow.Prepared, dataset: sj.Dataset, steps: int = 40
) -> sj.workflow.Outcome:
    """A short run that refines nothing, then multislice through layers of potential that does."""
    begin = time.monotonic()
    change = {"refine": [], "method.iterations": 10, "geometry.halo": True}
    plain = sj.experiment.override(prepared.experiment, change)
    outcome = sj.workflow.fit(dataclasses.replace(prepared, experiment=plain), dataset)
    held_out = outcome.held_out
    model, parameters = sj.workflow.refined_parameters(prepared.experiment, outcome.result.model)
    rate = optax.cosine_decay_schedule(0.3, steps, 0.05)
    adam = lambda parameter: optax.adam(rate, b2=0.95)
    joint = sj.refinement.joint(parameters, adam, len(dataset) - len(held_out))
    result = sj.fit_structure(
        model, dataset, case.layers, steps=steps, gauge=outcome.gauge, held_out=held_out,
        also={sj.refinement.moving_leaves(parameters): joint},
    )  # fmt: skip
    last = {name: values[-1] for name, values in result.history.items()}
    found = sj.refinement.coordinates(result.state)
    metrics = outcome.metrics | {
        "deviance_held_out": last["deviance_held_out"],
        "noise_deviance_held_out": last["noise_held_out"],
        "seconds": time.monotonic() - begin,
        "iterations": steps,
        "refined": {p.name: p.value(found[p.name]).tolist() for p in parameters},
    }
    return dataclasses.replace(outcome, result=result, metrics=metrics)


def iteration(case: Case, repeats: int = 4) -> dict[str, Any]:
    """Core seconds of each kind of step, how many of each a run takes, and the mean over the least.

    Positions stand where they truly were, so that frames share rungs as they do in a run.
    """
    prepared = sj.workflow.prepare(case.experiment)
    experiment, dataset = prepared.experiment, sj.workflow.load(prepared)
    training, held_out = sj.hold_out(dataset)
    model = sj.workflow.starting_model(experiment, dataset)
    model, parameters = sj.workflow.refined_parameters(experiment, model)
    true = _placed(case.truth.positions, dataset.scan.positions)
    model = eqx.tree_at(lambda m: m.scan.positions, model, jnp.asarray(true))
    model = sj.prepare(model, moving=sj.refinement.moving_leaves(parameters))
    noise = sj.losses.poisson()
    updates = sj.workflow.optimiser(experiment, model, noise, len(training), parameters)
    loss, state = sj.losses.objective(noise), updates.init(model)
    frames, aside = sj.batch(dataset, ordered(model, training)), sj.batch(dataset, held_out)
    every = [updates.at(n) for n in range(1, experiment.method.iterations + 1)]
    kinds = {_moved(due): due for due in every}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _, (kind, due) in itertools.product(range(repeats + 1), kinds.items()):
        kept = (aside,) if due.follows_frames() else ()
        begin = time.process_time()
        jax.block_until_ready(sj.make_step(loss, due)(model, state, frames, *kept))
        spent[kind].append(time.process_time() - begin)
    least = {kind: min(times[1:]) for kind, times in spent.items()}  # the first compiles them
    count = collections.Counter(_moved(due) for due in every)
    mean = sum(least[kind] * number for kind, number in count.items()) / len(every)
    return {"core_seconds": least, "steps": dict(count), "ratio": mean / least["specimen"]}


def _moved(due: sj.updates.Updates) -> str:
    """Which parts of the model move."""
    parts = {leaf.split(".")[0] for name in due.moving for leaf in name.split()}
    return ", ".join(sorted(parts - set(due.resting), reverse=True))


def at_best(outcome: sj.workflow.Outcome, truth: Truth) -> float:
    """rms error of positions, Å, that counts and prior leave where all else is known."""
    nominal = np.asarray(outcome.dataset.scan.positions, float)
    width = float(np.std(_placed(truth.positions, nominal) - nominal))
    every = np.arange(len(outcome.dataset))
    covariance = sj.position_errors(outcome.result.model, every, prior=width)
    return float(np.sqrt(np.mean(np.trace(covariance, axis1=1, axis2=2)) / 2))


def _placed(true, nominal):
    """True positions, moved as a whole onto the nominal ones."""
    true = np.asarray(true) - np.mean(true, axis=0) + np.mean(nominal, axis=0)
    return true.astype(np.asarray(nominal).dtype)


def errors(outcome: sj.workflow.Outcome, truth: Truth) -> dict[str, Any]:
    """How far each parameter ends from the truth."""
    model, held = outcome.result.model, outcome.held_out
    away = np.asarray(model.scan.positions, float)
    away = away - _placed(truth.positions, away).astype(float)
    fitted = np.setdiff1d(np.arange(len(away)), held)
    rms = lambda part: float(np.sqrt(np.mean((away[part] - away.mean(axis=0)) ** 2)))
    defocus = np.asarray(model.optics.defocus) - np.asarray(truth.defocus)
    lens, wanted = model.optics.aberrations, sj.cartesian(truth.lens)
    value = lambda name: float(lens.get(name, [0.0])[0]) - wanted.get(name, 0.0)
    size = lambda name: float(np.hypot(value(f"{name}a"), value(f"{name}b")))
    refined, moved = outcome.metrics["refined"], outcome.prepared.experiment.refine
    return {
        "positions_A": {"fitted": rms(fitted), "held_out": rms(held)},
        "positions_at_best_A": at_best(outcome, truth) if "positions" in moved else None,
        "defocus_A": float(np.abs(defocus - defocus.mean()).max()),
        "C12_A": size("C12"),
        "C21_A": size("C21"),
        "rotation_deg": refined["rotation"] - truth.rotation if "rotation" in refined else None,
        "camera_length": (
            refined["camera_length"] - truth.camera_length if "camera_length" in refined else None
        ),
    }


def cases(data: pathlib.Path, folder: pathlib.Path) -> dict[str, Callable[[], Case]]:
    """Every case by name, made when it is run."""
    tubes_of = lambda **how: misaligned(data, **how)
    told = lambda: tubes_of(defocus=TRUE, lens=LENS)._replace(told=True)
    heavy = {
        "energy": 300e3, "semiangle": 22.0, "defocus": (-110.0, 0.0, 80.0, 190.0),
        "scan_shape": (28, 28), "scan_step": 0.35, "dose": 2e5, "jitter": 0.2,
        "aberrations": {"C12": 25.0, "phi12": 0.4, "C21": 300.0, "phi21": 1.0}, "seed": 2,
    }  # fmt: skip
    turned = {
        "defocus": (-150.0, 0.0, 100.0, 250.0), "scan_shape": (28, 28), "dose": 1e5,
        "aberrations": {"C12": 20.0, "phi12": 0.3}, "seed": 4,
    }  # fmt: skip
    pixel = lambda: {"geometry.rotation_deg": 2.0}
    return {
        "told the truth": told,
        "not refined": tubes_of,
        "refined": lambda: tubes_of(refine=REFINED),
        "told the truth, a tenth of the dose": lambda: told()._replace(thin=0.1),
        "refined, a tenth of the dose": lambda: tubes_of(refine=REFINED)._replace(thin=0.1),
        "refined through layers, a tenth of the dose": lambda: tubes_of(refine=REFINED)._replace(
            thin=0.1, layers=(15.0, 100.0), score=None
        ),
        "refined, heavy atoms": lambda: simulated(folder / "heavy", heavy_atoms(), heavy, REFINED),
        "refined through layers, heavy atoms": lambda: simulated(
            folder / "layers", heavy_atoms(), heavy, REFINED
        )._replace(layers=(12.0, 92.0)),
        "refined, turned 2 degrees, camera length 1 %": lambda: camera_wrong(
            simulated(
                folder / "turned", sj.two_nanotubes(), turned,
                ("defocus", "C12", "rotation", "camera_length"), pixel(),
            )
        ),
        "1,000 electrons a frame, Poisson": lambda: few_electrons(data),
        "1,000 electrons a frame, Poisson on events": lambda: few_electrons(data, events=True),
        "1,000 electrons a frame, amplitude": lambda: few_electrons(data, loss="amplitude"),
    }  # fmt: skip


def camera_wrong(case: Case, by: float = 0.01) -> Case:
    """The same, told a camera length that is 1 % off."""
    pixel = case.experiment.geometry.detector_pixel_mrad
    change = {"geometry.detector_pixel_mrad": pixel / (1 + by)}
    experiment = sj.experiment.override(case.experiment, change)
    return case._replace(experiment=experiment, truth=case.truth._replace(camera_length=by))


def show(records: list[dict[str, Any]]) -> None:
    """The table, one line a case."""
    number = lambda v, form: "-".rjust(9) if v is None else format(v, form).rjust(9)
    heads = ("pos", "pos held", "defocus", "C12", "C21", "own", "width", "deviance", "noise", "s")
    print(f"{'case':<46}{''.join(h.rjust(9) for h in heads)}")
    for r in records:
        if r["case"] == ITERATION:
            cost = ", ".join(f"{k}: {v:.2f} s" for k, v in r["core_seconds"].items())
            print(f"{ITERATION:<46} {cost}; on average {r['ratio']:.2f} times the first")
            continue
        cells = [number(r["positions_A"][k], ".3f") for k in ("fitted", "held_out")]
        cells += [number(r[k], ".1f") for k in ("defocus_A", "C12_A", "C21_A")]
        cells += [number(r.get("own"), ".3f"), number(r.get("width_A"), ".0f")]
        cells += [number(r[k], ".4f") for k in ("deviance_held_out", "noise_deviance_held_out")]
        print(f"{r['case']:<46}{''.join(cells)}{number(r['seconds'], '.0f')}")
        for name in ("rotation_deg", "camera_length"):
            if r[name] is not None:
                print(f"{'':<46}  error of {name}: {r[name]:.4f}")


def main() -> None:
    """Run the cases, print the table, write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    here = pathlib.Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=here, help="folder of shared data")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--iterations", type=int, help="instead of the defaults'")
    parser.add_argument("--json", type=pathlib.Path, help="write the records to this file")
    options = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        every = cases(options.data, pathlib.Path(folder))
        for name in [n for n in (ITERATION, *every) if not options.only or n in options.only]:
            if name == ITERATION:
                record = iteration(every["refined"]())
            else:
                record = run(every[name](), options.iterations)
            records.append({"case": name} | record)
            show(records[-1:])
            write(records, options.json)
    show(records)


if __name__ == "__main__":
    main()
