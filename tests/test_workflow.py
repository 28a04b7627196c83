"""The stages between experiment file and outcome: geometry, storage, representation, precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

import smpr3d_jax as sj
from smpr3d_jax.app import outputs, workflow
from smpr3d_jax.app.experiment import from_mapping, load
from smpr3d_jax.data.readers import write_emd, write_stempy
from smpr3d_jax.inverse.reconstruction import make_evaluation
from smpr3d_jax.physics.scan import raster, series_of
from smpr3d_jax.physics.simulation import simulate_series
from smpr3d_jax.physics.smatrix import Beams, TiltModes
from smpr3d_jax.report import store

from . import tiny
from .tiny import changed, content, SCAN


def prepared(file, changes, **more):
    """The prepared experiment of `file` with other values, and its dataset."""
    ready = workflow.prepare(from_mapping(changed(content(file), changes | more)))
    return ready, workflow.load(ready)


def fit(file, changes):
    few = {"method.iterations": 3}
    return workflow.fit(*prepared(file, few | changes))


def fall(history):
    return history[0] - history[2]


def write_scans(folder, cubes, **how):
    """EMD files of counts, and the changes that put them into the experiment."""
    step, pixel = how.get("step", 0.5), 1e3 * sj.wavelength(80e3) * 2 / 20
    for i, cube in enumerate(cubes):
        write_emd(folder / f"new_{i}.h5", np.ascontiguousarray(cube), step, pixel, 80e3)
    return {f"scans.{i}.file": str(folder / f"new_{i}.h5") for i in range(len(cubes))}


def pixels(fine, axis):
    """24 sums over two samples each, those on the border by half, around sample 26."""
    take = lambda first: np.take(fine, np.arange(first, first + 48, 2), axis)
    return (take(1) + take(3)) / 2 + take(2)


def record(slices, positions, optics, roll=(0, 0)):
    """Counted cubes of one raster in all scans, k = 0 in the centre moved by half pixels `roll`."""
    scan = series_of([positions] * len(optics.defocus))
    # As fine as the cell allows, so that the pattern can be moved before the pixels are summed.
    fine = simulate_series(slices, optics, scan, (52, 52), 1, dose=25e3)
    fine = np.roll(np.fft.fftshift(np.asarray(fine), axes=(1, 2)), roll, axis=(1, 2))
    coarse = pixels(pixels(fine, 1), 2)
    counts = np.random.default_rng(5).poisson(coarse).astype(np.uint16)
    return counts.reshape(-1, *SCAN, 24, 24)


def optics(defocus=tiny.ACQUISITION.defocus, aberrations=None):
    return sj.focal_series(80e3, 30.0, list(defocus), aberrations)


def centred(rotation=0.0, transpose=False):
    positions = raster(SCAN, (0.5, 0.5), rotation, transpose)
    return positions - positions.mean(axis=0) + 10.0


def deviance(model, dataset):
    every = sj.batch(dataset, np.arange(len(dataset)))
    return float(make_evaluation(64)(model, every)["deviance"])


def deviance_of_vacuum(file, changes):
    """How far the model of an empty specimen is from the frames; 1 is noise alone."""
    ready, dataset = prepared(file, changes)
    return deviance(workflow.starting_model(ready.experiment, dataset), dataset)


@pytest.fixture(scope="module")
def empty(series):
    return eqx.tree_at(lambda s: s.potential, series.slices, replace_fn=jnp.zeros_like)


# --- stages --------------------------------------------------------------------------------------


def test_stages_follow_one_another(experiment_file, series):
    ready = workflow.prepare(load(experiment_file))
    assert [s.scan_shape for s in ready.sources] == [SCAN] * 3
    assert any("window behind a frame" in note for note in ready.notes)
    dataset = workflow.load(ready)
    assert len(dataset) == 54 and dataset.counts.frame_shape == (24, 24)
    counts = np.fft.fftshift(np.asarray(dataset.counts.dense(jnp.int32)), axes=(1, 2))
    np.testing.assert_array_equal(counts.reshape(3, *SCAN, 24, 24), np.stack(series.frames))
    np.testing.assert_allclose(
        dataset.scan.positions[:18], series.positions[0] - series.positions[0, 0], atol=1e-5
    )
    model = workflow.starting_model(ready.experiment, dataset)
    assert isinstance(model.specimen, TiltModes) and model.specimen.order == 8
    assert model.specimen.plane == 20.0
    np.testing.assert_allclose(model.dose, [f.sum() / 18 for f in series.frames], rtol=1e-6)


def test_facts_of_the_files_complete_the_experiment(experiment_file):
    changes = dict.fromkeys(
        ("geometry.scan_step", "geometry.detector_pixel_mrad", "beam.energy_ev")
    )
    ready, _ = prepared(experiment_file, changes)
    assert ready.experiment.geometry.scan_step == (0.5, 0.5)
    assert ready.experiment.beam.energy_ev == 80e3
    assert sum("is taken from" in note for note in ready.notes) == 3


def test_what_looks_wrong_passes_when_asked_for(experiment_file):
    ready, _ = prepared(experiment_file, {"scans.2.defocus": 400, "accept_implausible": True})
    assert any("the window behind a frame" in note for note in ready.notes)


# --- storage and geometry ------------------------------------------------------------------------


def test_events_give_what_dense_frames_give(finished, experiment_file, series, tmp_path):
    changes = {}
    for i, cube in enumerate(series.frames):
        events = sj.events_from_frames(sj.Frames(jnp.asarray(cube.reshape(-1, 24, 24))))
        write_stempy(tmp_path / f"events_{i}.h5", events, SCAN)
        changes[f"scans.{i}.file"] = str(tmp_path / f"events_{i}.h5")
    outcome = fit(experiment_file, changes)
    assert isinstance(outcome.dataset.counts, sj.Events)
    dense = store.load(finished[1] / "result.h5", "specimen/waves")
    np.testing.assert_allclose(outcome.result.model.specimen.waves, dense, atol=2e-6)
    metrics = store.load(finished[1] / "result.h5", "history/loss")
    np.testing.assert_allclose(outcome.metrics["loss_history"], metrics, rtol=1e-5)


def same_frames(one, other):
    """The datasets hold the same frames at the same places, but for a shift of all."""
    key = lambda d: (np.asarray(d.scan.positions) - np.asarray(d.scan.positions).min(0)).round(4)
    order = [np.lexsort((*key(d).T, np.asarray(d.scan.series))) for d in (one, other)]
    np.testing.assert_allclose(key(one)[order[0]], key(other)[order[1]], atol=1e-4)
    frames = [np.asarray(d.counts.dense())[o] for d, o in zip((one, other), order, strict=True)]
    np.testing.assert_array_equal(frames[0], frames[1])


@pytest.mark.parametrize(
    "turn, geometry",
    [
        (lambda c: c.swapaxes(0, 1), {"geometry.transpose": True}),
        (lambda c: np.rot90(c, 1), {"geometry.rotation_deg": 90.0}),
        (lambda c: np.rot90(c, 2), {"geometry.rotation_deg": 180.0}),
        (
            lambda c: np.rot90(c.swapaxes(0, 1), 1),
            {"geometry.rotation_deg": -90.0, "geometry.transpose": True},
        ),
    ],
    ids=["transposed", "quarter", "half", "both"],
)
def test_a_raster_stored_otherwise_is_the_same_data(
    experiment_file, series, tmp_path, turn, geometry
):
    changes = write_scans(tmp_path, [turn(cube) for cube in series.frames])
    _, dataset = prepared(experiment_file, changes, **geometry)
    same_frames(dataset, prepared(experiment_file, {})[1])


def test_a_rotated_raster_is_reconstructed_like_a_straight_one(
    finished, experiment_file, series, tmp_path
):
    angle = 0.5
    positions = centred(angle, True)
    changes = write_scans(tmp_path, record(series.slices, positions, optics()))
    right = {"geometry.rotation_deg": float(np.degrees(angle)), "geometry.transpose": True}
    told = fit(experiment_file, changes | right)
    placed = np.asarray(told.dataset.scan.positions[:18])
    np.testing.assert_allclose(placed, positions - positions[0], atol=1e-5)
    straight = fall(store.load(finished[1] / "result.h5", "history/loss"))
    assert fall(told.metrics["loss_history"]) == pytest.approx(straight, rel=0.2)
    untold = fit(experiment_file, changes)
    assert fall(untold.metrics["loss_history"]) < 0.8 * fall(told.metrics["loss_history"])


@pytest.mark.parametrize("pad", [((4, 0), (0, 0)), ((5, 0), (3, 0))])
def test_the_centre_may_be_anywhere_on_the_detector(experiment_file, series, tmp_path, pad):
    cubes = [np.pad(cube, ((0, 0), (0, 0), *pad)) for cube in series.frames]
    center = [12.0 + before for before, _ in pad]
    changes = write_scans(tmp_path, cubes)
    _, dataset = prepared(experiment_file, changes, **{"geometry.center": center})
    same_frames(dataset, prepared(experiment_file, {})[1])


@pytest.mark.parametrize("roll", [(1, 0), (-1, 1), (2, -2)])
def test_a_centre_between_pixels_is_modelled(experiment_file, empty, tmp_path, roll):
    files = write_scans(tmp_path, record(empty, centred(), optics(), roll))
    center = [12 + r / 2 for r in roll]
    told = deviance_of_vacuum(experiment_file, files | {"geometry.center": center})
    untold = deviance_of_vacuum(experiment_file, files)
    assert told < 1.3
    assert untold > 4 * told


def test_scans_may_be_shifted_against_each_other(experiment_file, tmp_path):
    ready, dataset = prepared(experiment_file, {"scans.1.shift": [1.0, -2.5]})
    first, second = np.asarray(dataset.scan.positions).reshape(3, 18, 2)[:2]
    np.testing.assert_allclose(second - first, np.tile([1.0, -2.5], (18, 1)), atol=1e-6)
    assert workflow.starting_model(ready.experiment, dataset).specimen.origin[1] < -2.5


def test_each_scan_may_have_its_own_aberrations(experiment_file, series, tmp_path):
    own = {"C12": 60.0, "phi12": 0.7, "C21": 1500.0, "phi21": 1.2}
    lens = optics(aberrations=[own, {"C30": 5e4}, own])
    files = write_scans(tmp_path, record(series.slices, centred(), lens))
    common = files | {"beam.aberrations": {"C30": 5e4}}
    told = {**common, "scans.0.aberrations": own, "scans.2.aberrations": own}
    made = workflow.optics(prepared(experiment_file, told)[0].experiment)
    for name, values in lens.aberrations.items():
        np.testing.assert_allclose(made.aberrations[name], values, rtol=1e-6)
    right, wrong = (fit(experiment_file, c).metrics["loss_history"] for c in (told, common))
    assert fall(wrong) < 0.8 * fall(right)


# --- layers of potential -------------------------------------------------------------------------


def test_a_run_may_end_with_a_potential(experiment_file, series, tmp_path):
    """Layers at their depths, on the pixels of the sections, each like the atoms that lie there."""
    wanted = {"structure": {"depths": [5, 35], "steps": 3}, "method.iterations": 8}
    outcome = fit(experiment_file, wanted)
    outputs.save(outcome, tmp_path)
    tree = store.load(tmp_path / "result.h5")
    found, about = tree["structure"], store.attributes(tmp_path / "result.h5", "sections/phase")
    np.testing.assert_array_equal(found["z"], [5, 35])
    assert found["units"] == "V Å"
    assert found["potential"].shape == (2, *tree["sections"]["phase"].shape[1:])
    for name in ("pixel_size_A", "origin_A"):
        np.testing.assert_allclose(found[name], about[name], rtol=1e-6)
    loss = found["history"]["loss"]
    assert loss[2] < loss[1] < loss[0]
    assert outcome.metrics["structure"]["deviance_held_out"] > 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("Potential at") == 2
    place = (found["origin_A"], found["pixel_size_A"], found["potential"].shape[1:])
    near, truth = true_layers(series, *place)
    for layer in (0, 1):
        assert tiny.correlation(found["potential"][layer][near], truth[layer][near]) > 0.6
        assert tiny.correlation(found["potential"][layer][near], truth[1 - layer][near]) < 0.3


def true_layers(series, origin, step, shape):
    """The specimen's two layers on pixels relative to the first position, and which are seen."""
    slices, first = series.slices, series.positions[0, 0]
    axes = [a + b * np.arange(n) + c for a, b, n, c in zip(origin, step, shape, first, strict=True)]
    y, x = np.meshgrid(*axes, indexing="ij")
    fine, upper = np.asarray(slices.potential), np.asarray(slices.depths) < 20
    at = [y / slices.grid.sampling[0], x / slices.grid.sampling[1]]
    # As sharp as the aperture of 30 mrad shows it.
    blurred = (gaussian_filter(fine[own].sum(axis=0), 1.5) for own in (upper, ~upper))
    truth = np.stack([map_coordinates(layer, at, order=1) for layer in blurred])
    (top, left), (bottom, right) = series.positions[0].min(0) - 2, series.positions[0].max(0) + 2
    return (y > top) & (y < bottom) & (x > left) & (x < right), truth


def test_without_structure_there_is_no_potential(finished):
    assert "structure" not in store.load(finished[1] / "result.h5")


# --- slices instead of an S-matrix ---------------------------------------------------------------

SLICES = {
    "method.name": "multislice", "method.representation": None, "method.iterations": 8,
    "object": {"slices": 2, "parametrisation": "phase", "batch": 6},
    "method.depth_range": [-10, 50],
}  # fmt: skip


def test_slices_give_the_same_outputs(experiment_file, series, tmp_path):
    """The two layers of atoms in two slices, and sections of the S-matrix of these."""
    tree = changed(content(experiment_file), {"method": {}})
    tree = changed(tree, {k: v for k, v in SLICES.items() if v is not None})
    file = tiny.write(tmp_path, tree)
    answer = tiny.smpr3d("run", file, "-o", tmp_path / "out", "--json")
    assert answer.exit_code == 0, answer.stderr
    found, about = store.load(tmp_path / "out" / "result.h5"), ("pixel_size_A", "origin_A")
    np.testing.assert_allclose(found["object"]["z"], [5, 35])
    phase = found["object"]["phase"][0]
    origin, step = (found["object"][name] for name in reversed(about))
    near, truth = true_layers(series, origin, step, phase.shape[1:])
    for layer in (0, 1):
        assert tiny.correlation(phase[layer][near], truth[layer][near]) > 0.6
        assert tiny.correlation(phase[layer][near], truth[1 - layer][near]) < 0.4
    assert found["probe"]["modes"].shape[:2] == (3, 1)
    assert found["sections"]["phase"].shape[0] == len(found["sections"]["z"])
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Ptychography with 2 slices" in report
    again = tmp_path / "other.h5"
    answer = tiny.smpr3d(
        "section", tmp_path / "out" / "result.h5", "--from", 0, "--to", 40, "--step", 20,
        "-o", again,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    assert store.load(again)["sections"]["phase"].shape[0] == 3


def test_one_slice_with_refined_positions_and_a_mixed_probe(experiment_file):
    changes = {
        "method": {"name": "singleslice", "iterations": 4}, "refine": ["positions", "background"],
        "object": {"probe_states": 2, "batch": 9, "rule": "lsqml"},
        "geometry.background": 0.01,
    }  # fmt: skip
    outcome = workflow.fit(*prepared(experiment_file, changes))
    assert outcome.result.model.specimen.values.shape[:2] == (1, 1)
    assert {r.parameter.name for r in outcome.refined} == {"positions", "background"}
    assert fall(outcome.result.history["loss"]) > 0
    start, found = outcome.dataset.scan.positions, outcome.result.model.scan.positions
    assert 0 < float(jnp.abs(found - start).max()) < 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"refine": ["C12"]}, "refine: C12 is part of a probe in pixels"),
        ({"refine": ["camera_length"], "object": {"probe": "optics"}}, "camera_length is the sam"),
        ({"object": {"rule": "lsqml", "probe": "optics"}}, "object.rule = lsqml moves object and"),
        ({"object": {"rule": "lsqml", "probe_step": 0}}, "object.rule = lsqml moves object and"),
        ({"object": {"halves": True}}, "object.halves: the scan covers .* wants 8; take it out"),
        ({"method": {"name": "singleslice"}, "refine": ["tilt"]}, "'tilt' of a single slice"),
    ],
)
def test_what_object_and_probe_take_up_themselves(experiment_file, changes, said):
    with pytest.raises(ValueError, match=said):
        workflow.fit(*prepared(experiment_file, {"method": {"name": "multislice"}} | changes))


def test_a_lens_and_a_tilt_are_refined_beside_slices(experiment_file):
    changes = {
        "method": {"name": "multislice", "iterations": 5, "depth_range": [-10, 50]},
        "refine": ["tilt", "depths", "C12"], "object": {"probe": "optics", "slices": 2},
        "refinement": {"first": 2},
    }  # fmt: skip
    outcome = workflow.fit(*prepared(experiment_file, changes))
    found = {r.parameter.name: r.found for r in outcome.refined}
    assert {"tilt", "depths"} < set(found)
    assert np.abs(found["tilt"]).max() > 0
    np.testing.assert_allclose(np.mean(found["depths"]), 20, atol=1e-3)
    assert fall(outcome.result.history["loss"]) > 0


# --- representations, precision, number of scans -------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"refine": ["defocus"]}, True),
        ({"structure": {"depths": [5.0, 20.0]}}, True),
        ({"refine": ["defocus"], "geometry.halo": False}, False),
        ({"geometry.halo": True}, True),
    ],
    ids=["nothing", "refine", "structure", "refused", "asked for"],
)
def test_the_probe_goes_on_beyond_its_window_where_that_matters(experiment_file, changes, expected):
    asked = sj.experiment.override(load(experiment_file), changes)
    assert workflow.camera(asked, (20, 24)).halo is expected


@pytest.mark.parametrize(
    ("given", "dose", "expected"),
    [(None, 1e5, 0.03), (None, 3200.0, 0.15), (None, 100.0, 0.3), (0.01, 100.0, 0.01)],
)
def test_few_electrons_leave_fewer_directions(experiment_file, given, dose, expected):
    asked = sj.experiment.override(load(experiment_file), {"method.subspace_tolerance": given})
    assert workflow.subspace_tolerance(asked, dose) == pytest.approx(expected)


def test_beams_with_another_loss_and_nothing_held_out(experiment_file, tmp_path):
    other = {"method.representation": "beams", "method.loss": "amplitude", "method.held_out": 0.0}
    outcome = fit(experiment_file, other)
    specimen = outcome.result.model.specimen
    assert isinstance(specimen, Beams)
    history = outcome.metrics["loss_history"]
    assert history[2] < history[1] < history[0]
    assert outcome.metrics["deviance_held_out"] is None
    assert outcome.metrics["r_factor_held_out"] is None
    assert outputs.frame_pairs(outcome)[0]["label"].endswith("(fitted)")
    outputs.save(outcome, tmp_path)
    seen = outputs.load_view(tmp_path / "result.h5")
    assert isinstance(seen.specimen, Beams) and seen.specimen.window == specimen.window
    np.testing.assert_array_equal(seen.specimen.waves, specimen.waves)
    answer = tiny.smpr3d(
        "section", tmp_path / "result.h5", "--from", -15, "--to", 55, "--step", 5,
        "-o", tmp_path / "s.h5",
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    first, again = (store.load(tmp_path / n, "sections/phase") for n in ("result.h5", "s.h5"))
    assert first.std() > 1e-4
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_double_precision_is_double_throughout(finished, experiment_file, tmp_path):
    file = tiny.write(tmp_path, changed(content(experiment_file), {"method.precision": "float64"}))
    answer = tiny.smpr3d("run", file, "-o", tmp_path / "out", *tiny.FEW, "--quiet")
    assert answer.exit_code == 0, answer.output
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    double, single = (store.load(f / "result.h5") for f in (tmp_path / "out", finished[1]))
    assert double["specimen"]["waves"].dtype == np.complex128
    np.testing.assert_allclose(double["specimen"]["waves"], single["specimen"]["waves"], atol=1e-4)
    np.testing.assert_allclose(double["sections"]["phase"], single["sections"]["phase"], atol=1e-3)
    made = tiny.smpr3d(
        "section", tmp_path / "out" / "result.h5", "--from", 0, "--to", 5, "--step", 5,
        "-o", tmp_path / "s.h5",
    )  # fmt: skip
    assert made.exit_code == 0, made.output


def test_one_scan_is_a_series_of_one(experiment_file):
    tree = content(experiment_file)
    tree["scans"] = tree["scans"][2:]
    tree["method"]["iterations"] = 3
    tree["sections"] = {}
    ready = workflow.prepare(from_mapping(tree))
    outcome = workflow.fit(ready, workflow.load(ready))
    history = outcome.metrics["loss_history"]
    assert history[2] < history[1] < history[0]
    assert len(outcome.metrics["r_factor_per_scan"]) == 1
    assert len(outcome.held_out) == 1


def test_a_run_stops_when_the_held_out_frames_say_so(experiment_file):
    stop = {"method.stop": {"patience": 1}, "method.iterations": 40}
    outcome = fit(experiment_file, stop)
    judged = outcome.metrics["deviance_held_out_history"]
    assert len(judged) < 40
    assert judged[-1] >= min(judged[:-1])
    assert outcome.metrics["deviance_held_out"] == pytest.approx(min(judged), rel=1e-4)
