"""Frames changed as they are read, step by step, and what an experiment file says of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import smpr3d_jax as sj
from smpr3d_jax.app import sources, workflow
from smpr3d_jax.app.experiment import ExperimentError, from_mapping, template
from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.electrons import bin_detector, crop
from smpr3d_jax.data.readers import load_series, read, with_mask, write_stempy
from smpr3d_jax.data.readers.steps import (
    descanned,
    in_electrons,
    through_window,
    without_bad_pixels,
)
from smpr3d_jax.inverse.reconstruction import make_evaluation

from .tiny import changed, content, SCAN


SHAPE = (26, 31)


def disc(center=(12.0, 16.0), radius=6.0, level=8.0):
    y, x = np.indices(SHAPE)
    return level * (radius + 0.5 - np.hypot(y - center[0], x - center[1])).clip(0, 1) + 0.05


def cube(mean, scan=(5, 7), seed=0):
    return (
        np.random.default_rng(seed).poisson(np.broadcast_to(mean, (*scan, *SHAPE))).astype(np.uint8)
    )


def source_of(folder, values, events=False):
    if not events:
        np.save(folder / "scan.npy", values)
        return read(folder / "scan.npy")
    frames = Frames(jnp.asarray(values.reshape(-1, *values.shape[2:])))
    write_stempy(folder / "scan.h5", events_from_frames(frames), values.shape[:2])
    return read(folder / "scan.h5", frame_shape=values.shape[2:])


def dense(source, index=None):
    return np.asarray(source.read(index).dense(jnp.int32))


# --- sources --------------------------------------------------------------------------------------


def test_in_electrons(tmp_path):
    counts = cube(disc())
    noisy = 12.5 * counts + np.random.default_rng(1).normal(0, 0.8, counts.shape)
    noisy[..., 3, 4] = np.nan
    mask = np.ones(SHAPE, bool)
    mask[3, 4] = False
    source = in_electrons(with_mask(source_of(tmp_path, noisy.astype(np.float32)), mask), 12.5)
    truth = np.where(mask, counts, 0).reshape(-1, *SHAPE)
    np.testing.assert_array_equal(dense(source), truth)
    np.testing.assert_array_equal(dense(source, np.array([8, 2])), truth[[8, 2]])
    with pytest.raises(InputError, match=r"scan\.npy.*from whole numbers"):
        in_electrons(source_of(tmp_path, 1.4 * counts), 2.1).read()
    with pytest.raises(InputError, match="holds single electrons"):
        in_electrons(source_of(tmp_path, counts, events=True), 2.0)


@pytest.mark.parametrize("events", [False, True])
def test_without_bad_pixels(tmp_path, events):
    counts = cube(disc())
    counts[..., 20, 25] += 9
    counts[..., 12, 13] = 0
    source, found = without_bad_pixels(source_of(tmp_path, counts, events))
    assert np.argwhere(found.hot).tolist() == [[20, 25]]
    assert np.argwhere(found.dead).tolist() == [[12, 13]]
    np.testing.assert_array_equal(source.mask, found.mask)
    again, found = without_bad_pixels(source)
    assert found.mask.all() and again is source


@pytest.mark.parametrize("events", [False, True])
def test_descanned(tmp_path, events):
    """Frames of a disc that wanders along both scan directions come to where their mean was."""
    scan = (6, 8)
    ramp = np.stack(
        np.meshgrid(np.linspace(-1.6, 1.6, 6), np.linspace(-2.4, 2.4, 8), indexing="ij"), -1
    )
    counts = np.stack(
        [cube(disc((12 + a, 16 + b)), (1, 1), i)[0] for i, (a, b) in enumerate(ramp.reshape(-1, 2))]
    )
    source = source_of(tmp_path, counts.reshape(*scan, *SHAPE), events)
    mask = np.ones(SHAPE, bool)
    mask[5, 20] = False
    moved, found = descanned(with_mask(source, mask), 1, (12.0, 16.0), 6.0)
    np.testing.assert_allclose(found.centers.reshape(*scan, 2) - [12, 16], ramp, atol=0.15)
    np.testing.assert_allclose(found.centers + found.shifts, [[12.0, 16.0]] * 48, atol=0.65)
    for i in (0, 9, 47):
        by = tuple(found.shifts[i])
        truth = np.roll(np.where(mask, counts[i, 0], 0), by, (0, 1))
        np.testing.assert_array_equal(dense(moved, np.array([i]))[0][moved.mask], truth[moved.mask])
    np.testing.assert_array_equal(dense(moved)[[9, 4]], dense(moved, np.array([9, 4])))
    assert moved.mask is not None
    assert not moved.mask[:2].any() and not moved.mask[:, -2:].any() and moved.mask[12, 16]
    assert not moved.mask[4:7, 18:23].all() and moved.mask[3:24, 3:17].all()
    still, found = descanned(source_of(tmp_path, cube(disc()), events), 1, (12.0, 16.0), 6.0)
    assert not found.shifts.any() and still.mask is None


@pytest.mark.parametrize("events", [False, True])
def test_a_disc_that_wanders_far(tmp_path, events):
    """Where it leaves the circle that is looked at, one look finds too little of the way."""
    scan, radius = (6, 8), 4.0
    ways = np.meshgrid(np.linspace(-6, 6, 6), np.linspace(-9, 9, 8), indexing="ij")
    ways = np.stack(ways, -1).reshape(-1, 2)
    frames = [cube(disc((13 + a, 15 + b), radius), (1, 1), i)[0] for i, (a, b) in enumerate(ways)]
    source = source_of(tmp_path, np.stack(frames).reshape(*scan, *SHAPE), events)
    found = descanned(source, 1, (13.0, 15.0), radius)[1]
    np.testing.assert_allclose(found.centers - [13, 15], ways, atol=0.4)


def test_rounding_of_single_frames(tmp_path):
    """In a frame of few electrons some lie far from whole numbers; in the scan they do not."""
    counts = np.random.default_rng(3).poisson(0.01, (9, 11, *SHAPE))
    noisy = counts + np.random.default_rng(4).normal(0, 0.12, counts.shape)
    source = in_electrons(source_of(tmp_path, noisy), 1.0)
    frames = [dense(source, np.array([i]))[0] for i in range(len(source))]
    np.testing.assert_array_equal(frames, dense(source))
    assert np.mean(dense(source) != counts.reshape(-1, *SHAPE)) < 2e-3


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("center, shape, factor", [
    (None, None, 2), ((12, 16), None, 3), ((11, 14), (16, 20), 4), ((11, 14), (9, 12), 1),
])  # fmt: skip
def test_through_a_window(tmp_path, events, center, shape, factor):
    counts = cube(disc())
    mask = np.ones(SHAPE, bool)
    mask[9, 12] = mask[0] = False
    source = with_mask(source_of(tmp_path, counts, events), mask)
    found = through_window(source, center, shape, factor)
    size = shape or tuple(n * factor for n in found.frame_shape)
    assert found.frame_shape == tuple(n // factor for n in size)
    clean = Frames(np.where(mask, counts, 0).reshape(-1, *SHAPE))
    truth = bin_detector(crop(clean, size, center), factor).dense(jnp.int32)
    good = (
        bin_detector(crop(Frames((~mask)[None].astype(np.uint8)), size, center), factor).dense(int)[
            0
        ]
        == 0
    )
    np.testing.assert_array_equal(found.mask, good)
    truth = np.where(good, truth, 0)
    np.testing.assert_array_equal(dense(found), truth)
    assert not good.all()
    data = load_series([found], 0.5)
    shift = [-(n // 2) for n in found.frame_shape]
    np.testing.assert_array_equal(data.counts.dense(jnp.int32), np.roll(truth, shift, (1, 2)))
    np.testing.assert_array_equal(data.mask, np.roll(good, shift, (0, 1)))


def test_windows_that_do_not_fit(tmp_path):
    source = source_of(tmp_path, cube(disc()))
    with pytest.raises(InputError, match=r"scan\.npy.*does not fit"):
        through_window(source, (3, 3), (12, 12))
    with pytest.raises(InputError, match="12 × 15 pixels cannot be binned by 4"):
        through_window(source, None, (12, 15), 4)


# --- experiments ----------------------------------------------------------------------------------


def save(folder, cubes):
    """The cubes as files, and the changes that put them into the experiment."""
    for i, frames in enumerate(cubes):
        np.save(folder / f"new_{i}.npy", np.asarray(frames))
    return {f"scans.{i}.file": str(folder / f"new_{i}.npy") for i in range(len(cubes))}


def ready(file, changes):
    tree = content(file)
    tree.setdefault("preprocess", {})
    return workflow.prepare(from_mapping(changed(tree, changes)))


def deviance(model, data):
    return make_evaluation(64)(model, sj.batch(data, np.arange(len(data))))


@pytest.mark.parametrize("factor, middle", [(2, (0.0, 0.0)), (3, (-2.0, 1.2))])
def test_a_binned_camera_sees_what_a_coarse_one_would(experiment_file, tmp_path, factor, middle):
    """Counts of a finer camera, binned, fit the model of vacuum as those of a coarse one do.

    Boxes of pixels lie beside the centre, by a quarter or a third of a pixel here: that is known.
    """
    fine, shape = (
        content(experiment_file)["geometry"]["detector_pixel_mrad"] / factor,
        (24 * factor + 9,) * 2,
    )
    center = tuple(n // 2 + m for n, m in zip(shape, middle, strict=True))
    geometry = {"geometry.detector_pixel_mrad": fine, "geometry.center": center}
    blank = save(tmp_path, [np.ones((*SCAN, *shape), np.uint16)] * 3)
    plain = ready(experiment_file, blank | geometry)
    model = workflow.starting_model(plain.experiment, workflow.load(plain))
    seen = model.detector.shape
    expected = np.asarray(model(jnp.arange(54, dtype=jnp.int32)))
    expected = np.fft.fftshift(expected, axes=(1, 2)) * 25e3 / expected[0].sum()
    whole = np.zeros((54, *shape))
    at = [round(c) - n // 2 for c, n in zip(center, seen, strict=True)]
    whole[:, at[0] : at[0] + seen[0], at[1] : at[1] + seen[1]] = expected
    counts = np.random.default_rng(0).poisson(whole).astype(np.uint16).reshape(3, *SCAN, *shape)
    window = {"preprocess.bin": factor, "preprocess.crop": [24 * factor, 24 * factor]}
    prepared = ready(experiment_file, save(tmp_path, counts) | geometry | window)
    data = workflow.load(prepared)
    assert data.counts.frame_shape == (24, 24)
    model = workflow.starting_model(prepared.experiment, data)
    assert model.detector.pixel == pytest.approx(factor * fine)
    rest = [(c - round(c) - (factor - 1) / 2) / factor for c in center]
    np.testing.assert_allclose(model.detector.offset, rest, atol=1e-9)
    told = float(deviance(model, data)["deviance"])
    camera = dataclasses.replace(model.detector, offset=(0.0, 0.0))
    untold = float(deviance(dataclasses.replace(model, detector=camera), data)["deviance"])
    assert told < 1.5 and untold > 2 * told


def test_steps_through_an_experiment(experiment_file, series, tmp_path):
    """An integrating camera with a hot pixel, whose pattern wanders: all of it is undone."""
    shifts = np.rint(np.linspace([-0.3, -1.7], [0.3, 1.7], SCAN[1])).astype(int)
    cubes = []
    for i, frames in enumerate(series.frames):
        wide = np.pad(frames, ((0, 0), (0, 0), (4, 4), (4, 4)))
        moved = [np.roll(wide[:, j], shifts[j], (1, 2)) for j in range(SCAN[1])]
        counts = 30.0 * np.stack(moved, axis=1)
        counts[..., 7, 6] += 30 * 400
        cubes.append(counts + np.random.default_rng(i).normal(0, 1.5, counts.shape))
    steps = {"preprocess.counts_per_electron": 30.0, "preprocess.bad_pixels": True,
             "preprocess.descan": 1, "preprocess.crop": [24, 24]}  # fmt: skip
    prepared = ready(experiment_file, save(tmp_path, cubes) | steps)
    told = "\n".join(prepared.notes)
    assert "1 hot" in told and "the pattern wanders by" in told and "undone" in told
    data, truth = workflow.load(prepared), workflow.load(ready(experiment_file, {}))
    assert data.counts.frame_shape == (24, 24)
    assert data.mask is not None and 0.95 < np.mean(data.mask) < 1
    mask = np.asarray(data.mask)
    different = np.asarray(data.counts.dense() != truth.counts.dense())[:, mask]
    assert np.mean(different) < 1e-3
    np.testing.assert_allclose(data.dose, truth.dose, rtol=2e-3)


def test_the_camera_is_said_in_pixels_of_the_files(experiment_file):
    """A binned pixel is wider than the spread of a point, and gathers the background of many."""
    said = {"geometry.blur_pixels": 0.6, "geometry.background": 0.01, "preprocess.bin": 2}
    experiment = from_mapping(changed(content(experiment_file) | {"preprocess": {}}, said))
    camera = workflow.camera(experiment, (24, 24))
    assert camera.blur is not None and camera.background is not None
    assert float(camera.blur) == pytest.approx(0.3)
    assert float(camera.background) == pytest.approx(0.04)


@pytest.mark.parametrize("changes, key", [
    ({"crop": [24, 2000]}, "preprocess.crop"), ({"bin": 1000}, "preprocess.bin"),
    ({"counts_per_electron": 7.0}, "preprocess.counts_per_electron"),
    ({"descan": 3}, "preprocess.descan"),
])  # fmt: skip
def test_steps_that_cannot_be_done_are_named(experiment_file, tmp_path, changes, key):
    tree, folder = content(experiment_file), tmp_path
    frames = events_from_frames(Frames(jnp.ones((4, 24, 24), jnp.uint8)))
    write_stempy(folder / "e.h5", frames, (2, 2))
    tree["scans"] = [{"file": str(folder / "e.h5"), "defocus": 0.0}]
    with pytest.raises(InputError, match=rf"{key}: .*e\.h5"):
        workflow.prepare(from_mapping(tree | {"preprocess": changes}))


def test_another_gain_than_the_file_says(experiment_file, series, tmp_path, monkeypatch):
    files = save(tmp_path, [3.0 * f for f in series.frames])
    read_plainly = sources.read

    def read_with_a_gain(path, **hints):
        source = read_plainly(path, **hints)
        return dataclasses.replace(source, facts={"counts_per_electron": 2.5})

    monkeypatch.setattr(sources, "read", read_with_a_gain)
    notes = ready(experiment_file, files | {"preprocess.counts_per_electron": 3.0}).notes
    assert any("counts_per_electron = 3 is used, not 2.5 as in new_0.npy" in n for n in notes)


def test_what_poisson_statistics_cannot_take(experiment_file, series, tmp_path):
    files = save(tmp_path, [1.7 * f for f in series.frames])
    with pytest.raises(InputError, match=r"not whole numbers.*`preprocess\.counts_per_electron`"):
        ready(experiment_file, files)
    for change in ({"method.loss": "amplitude"}, {"accept_implausible": True}):
        notes = ready(experiment_file, files | change).notes
        assert any("not whole numbers" in note for note in notes)
    ready(experiment_file, files | {"preprocess.counts_per_electron": 1.7})
    with pytest.raises(InputError, match="from whole numbers, more than"):
        ready(experiment_file, files | {"preprocess.counts_per_electron": 1.2})


@pytest.mark.parametrize("changes, message", [
    ({"crop": [24, 23], "bin": 2}, "preprocess.crop.*must be multiples of bin = 2, not 23"),
    ({"bin": 0}, "preprocess.bin"), ({"descan": 4}, "preprocess.descan"),
    ({"counts_per_electron": -1.0}, "preprocess.counts_per_electron"),
    ({"hot": True}, "hot"),
])  # fmt: skip
def test_keys_that_cannot_be_meant(experiment_file, changes, message):
    with pytest.raises(ExperimentError, match=message):
        from_mapping(content(experiment_file) | {"preprocess": changes})


def test_the_template_shows_the_steps_in_their_order():
    text = template()
    keys = ["counts_per_electron", "bad_pixels", "descan", "crop", "bin"]
    places = [text.index(f"\n  {key}:") for key in keys]
    assert places == sorted(places)
    assert "  mask: " in text[: places[0]]
    given = ready_template(text)
    assert given.preprocess.bin == 1 and given.preprocess.crop is None


def ready_template(text):
    from ruamel.yaml import YAML

    return from_mapping(YAML(typ="safe").load(text))
