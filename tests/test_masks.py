"""Masked pixels: left out of everything, whatever they hold."""

from functools import partial
from typing import Any

import equinox as eqx
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smpr3d_jax as sj
from smpr3d_jax.app import workflow
from smpr3d_jax.app.experiment import from_mapping
from smpr3d_jax.data.counts import compare, Events, events_from_frames, Frames, InputError
from smpr3d_jax.data.dataset import Batch, batch, Dataset, join, subset
from smpr3d_jax.data.readers import (
    check_counts,
    describe,
    load_series,
    read,
    read_mask,
    with_mask,
    write_emd,
    write_stempy,
)
from smpr3d_jax.inverse.losses import (
    event_poisson,
    figures_of_merit,
    NOISES,
    objective,
    poisson,
)
from smpr3d_jax.inverse.reconstruction import make_evaluation, reconstruct
from smpr3d_jax.inverse.uncertainty import bootstrap, laplace, position_errors
from smpr3d_jax.inverse.updates import per_leaf
from smpr3d_jax.physics.scan import raster, Scan

from .scan_files import FRAME, SCAN, some_cube
from .test_losses import far, heavy_tailed, Table, table
from .test_uncertainty import aberration, case, tangent
from .tiny import changed, content


FLOAT32: Any = np.float32


def mask_of(shape, seed=5, part=0.3):
    """Some pixels that may not be used, none of them special."""
    return jnp.asarray(np.random.default_rng(seed).random(shape) > part)


def spoilt(counts, mask, value: Any):
    """The frames with `value` in all masked pixels."""
    dtype = np.result_type(counts.values.dtype, np.min_scalar_type(value))
    values = np.asarray(counts.values).astype(dtype)
    values[:, ~np.asarray(mask)] = value
    return Frames(jnp.asarray(values))


def stored(counts, sparse):
    return events_from_frames(counts) if sparse else counts


def same(a, b):
    """Equal to the last bit, whatever the tree."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", [*NOISES, "heavy_tailed"])
def test_compare_takes_the_pixels_that_count(x64, name, sparse):
    noise = heavy_tailed if name == "heavy_tailed" else NOISES[name]()
    model, counts = table()
    mask = mask_of(counts.frame_shape)
    pixel = jax.vmap(jax.vmap(jax.vmap(noise)))(model.frames, counts.dense())
    truth = np.where(mask, pixel, 0).sum((1, 2))
    total = lambda i, n: jnp.sum(compare(noise, i, n, mask))
    loss = jax.jit(lambda i, n: (compare(noise, i, n, mask), jax.grad(total)(i, n)))
    results = []
    for value in (0, 1, 60000):
        n = stored(spoilt(counts, mask, value), sparse)
        results.append(loss(model.frames, n))
        np.testing.assert_allclose(results[-1][0], truth, rtol=1e-12)
        # Longer lists of events are summed in another order.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13), results[-1], results[0])
    slope = jax.jit(jax.grad(lambda i: compare(noise, i, counts).sum()))(model.frames)
    np.testing.assert_allclose(results[0][1], np.where(mask, slope, 0), rtol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_masked_pixels_need_not_be_numbers(value):
    model, counts = table(dtype=FLOAT32)
    mask = mask_of(counts.frame_shape)
    index = jnp.asarray([3, 0, 4], jnp.int32)
    good, bad = (Batch(spoilt(counts, mask, v)[index], index, mask) for v in (np.float32(0), value))
    wild = eqx.tree_at(lambda m: m.frames, model, jnp.where(mask, model.frames, value))
    for noise in (poisson(), heavy_tailed):
        slope = jax.jit(jax.value_and_grad(objective(noise)))
        same(slope(model, bad), slope(model, good))
        found = slope(wild, bad)
        np.testing.assert_array_equal(found[0], slope(model, good)[0])
        assert np.all(np.isfinite(found[1].frames))
    same(figures_of_merit(wild, bad), figures_of_merit(model, good))


@pytest.mark.parametrize("sparse", [False, True])
def test_without_a_mask_nothing_else_is_compiled(sparse):
    model, counts = table()
    counts, index = stored(counts, sparse), jnp.arange(5, dtype=jnp.int32)
    noise = poisson()

    def plain(model, batch):
        """The objective as it would be written had nobody thought of masks."""
        flat = model(batch.index).reshape(5, -1)
        lifted = jax.vmap(jax.vmap(noise))
        if not sparse:
            n = batch.counts.dense(flat.dtype).reshape(flat.shape)
            return jnp.mean(jnp.sum(lifted(flat, n), axis=1))
        hit = jnp.take_along_axis(flat, batch.counts.pixels, axis=1)
        n = batch.counts.multiplicity.astype(flat.dtype)
        extra = lifted(hit, n) - lifted(hit, jnp.zeros_like(n))
        extra = jnp.where(n > 0, extra, jnp.zeros_like(extra))
        every = jnp.sum(lifted(flat, jnp.zeros_like(flat)), axis=1) + jnp.sum(extra, axis=1)
        return jnp.mean(every)

    texts = [str(jax.make_jaxpr(f)(model, Batch(counts, index))) for f in (objective(noise), plain)]
    assert texts[0] == texts[1]


def test_event_likelihood_of_masked_frames(x64):
    model, counts = far(40.0, np.complex128)
    mask, index = mask_of(counts.frame_shape), jnp.asarray([3, 0, 4], jnp.int32)
    slope_of = jax.jit(jax.value_and_grad(objective(poisson())))
    truth = slope_of(model, Batch(counts[index], index, mask))
    loss = jax.jit(jax.value_and_grad(event_poisson()))
    for value in (0, 7):
        events = events_from_frames(spoilt(counts, mask, value))
        found = loss(model, Batch(events[index], index, mask))
        np.testing.assert_allclose(found[0], truth[0], rtol=1e-12)
        error = jnp.linalg.norm(found[1].waves - truth[1].waves)
        assert float(error) < 1e-12 * float(jnp.linalg.norm(truth[1].waves))


@pytest.mark.parametrize("sparse", [False, True])
def test_figures_of_merit_are_those_of_the_pixels_that_count(x64, sparse):
    model, counts = table()
    mask = mask_of(counts.frame_shape)
    data = dataset_of(stored(spoilt(counts, mask, 9), sparse), mask)
    found = make_evaluation(2)(model, batch(data, np.arange(5)))
    keep = np.asarray(mask)
    i, n = np.asarray(model.frames)[:, keep], np.asarray(counts.dense())[:, keep]
    few = Batch(Frames(jnp.asarray(n[:, :, None])), jnp.arange(5, dtype=jnp.int32))
    alone = eqx.tree_at(lambda m: m.frames, model, jnp.asarray(i[:, :, None]))
    truth = make_evaluation(2)(alone, few)
    assert {*truth} == {"deviance", "noise", "r_factor"}
    for name in truth:
        np.testing.assert_allclose(found[name], truth[name], rtol=1e-12)
    assert int(data.pixels) == keep.sum()


# --- datasets -------------------------------------------------------------------------------------


def dataset_of(counts, mask, scans=1):
    per_scan = len(counts) // scans
    positions = np.concatenate([raster((1, per_scan), (0.5, 0.4))] * scans)
    series = jnp.asarray(np.repeat(np.arange(scans), per_scan), jnp.int32)
    scan = Scan(jnp.asarray(positions, float), series)
    return Dataset(counts, scan, ((1, per_scan),) * scans, mask)


def test_the_mask_goes_along():
    _, counts = table(frames=6)
    one, two = (mask_of(counts.frame_shape, seed) for seed in (1, 2))
    first, second = dataset_of(counts, one), dataset_of(counts, np.asarray(two))
    for part in (batch(first, np.array([2, 0])), subset(first, np.array([2, 0]))):
        np.testing.assert_array_equal(part.mask, one)
    np.testing.assert_array_equal(join([first, second]).mask, one & two)
    np.testing.assert_array_equal(join([first, dataset_of(counts, None)]).mask, one)
    assert join([dataset_of(counts, None)] * 2).mask is None
    with pytest.raises(InputError, match=r"mask of \(4, 6\) pixels but frames of \(6, 4\)"):
        dataset_of(counts, one.T)


def disc(shape=(20, 24), radius=6.0):
    """Bright-field disc and a faint tail, zero frequency in the corner."""
    y, x = (np.fft.fftfreq(n, 1 / n) for n in shape)
    r = np.hypot(y[:, None], x[None])
    return 30.0 * (radius + 0.5 - r).clip(0, 1) + 0.5 * np.exp(-r / 5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("masked", ["pixels", "gap", "rim", "centre"])
def test_dose_counts_what_masked_pixels_would_have_had(sparse, masked):
    mean = np.stack([disc(), 0.7 * disc()])
    counts = np.random.default_rng(0).poisson(np.repeat(mean, 40, axis=0)).astype(np.uint16)
    y, x = (np.fft.fftfreq(n, 1 / n) for n in disc().shape)
    r = np.hypot(y[:, None], x[None])
    mask = {
        "pixels": np.asarray(mask_of(r.shape, part=0.1)),
        "gap": (np.abs(x[None]) > 1) & (np.abs(y[:, None] - 3) > 1),
        "rim": r < 9.6,
        "centre": r > 1.6,
    }[masked]
    kept = Frames(jnp.asarray(counts))
    data = dataset_of(stored(kept, sparse), mask, 2)
    np.testing.assert_allclose(data.dose, mean.sum((1, 2)), rtol=0.02)
    left = np.where(mask, mean, 0).sum((1, 2))
    if masked != "rim":
        assert np.all(left < 0.98 * mean.sum((1, 2))), "the mask leaves out electrons"
    wild = dataset_of(stored(spoilt(kept, mask, 60000), sparse), mask, 2)
    np.testing.assert_array_equal(wild.dose, data.dose)
    everywhere = dataset_of(stored(kept, sparse), np.ones_like(mask), 2)
    np.testing.assert_allclose(everywhere.dose, dataset_of(kept, None, 2).dose, rtol=1e-6)


# --- fits and their errors ------------------------------------------------------------------------


class Logarithms(Table):
    """A model that is positive whatever its leaf."""

    def __call__(self, index):
        return jnp.exp(self.frames[index])


def test_a_fit_does_not_feel_masked_pixels():
    start, counts = table(dtype=FLOAT32, frames=7)
    model = Logarithms(jnp.log(start.frames + 0.1))
    mask = mask_of(counts.frame_shape)
    runs = []
    for value in (0, 60000):
        data = dataset_of(spoilt(counts, mask, value), mask)
        updates = per_leaf({"frames": optax.adam(0.05)})
        arguments = (model, data, objective(poisson()), updates)
        runs.append(reconstruct(*arguments, steps=3, held_out=np.array([2, 5]), chunk=3))
    assert runs[0].history == runs[1].history
    same(runs[0].model, runs[1].model)
    moved = np.any(np.asarray(runs[0].model.frames) != np.asarray(model.frames), axis=0)
    np.testing.assert_array_equal(moved, mask)


def test_information_of_masked_pixels_is_none(x64):
    model, _ = case()
    mask, index = mask_of(model.detector.shape), np.arange(len(model.scan.series))
    move = eqx.filter(aberration(model, "C12a", jnp.full(2, 30.0)), eqx.is_inexact_array)
    frames = jnp.asarray(index, jnp.int32)

    @jax.jit
    def moved(size):
        add = lambda a, b: a if b is None else a + size.astype(a.dtype) * b
        return jax.tree.map(add, model, move, is_leaf=lambda x: x is None)(frames)

    at = lambda size: np.asarray(moved(jnp.asarray(size)))
    slope = (at(1e-4) - at(-1e-4)) / 2e-4
    weight = np.where(mask, 1 / (at(0.0) + 0.002), 0)
    truth = np.sum(slope**2 * weight)
    step = jnp.zeros_like(model.scan.positions).at[1, 0].set(1)
    unit = tangent(model, lambda m: m.scan.positions, step)
    found = laplace(model, index, {"C12a": move, "y": unit}, chunk=5, mask=mask)
    known = np.linalg.inv(found.matrix)
    np.testing.assert_allclose(known[0, 0], truth, rtol=1e-8)
    alone = position_errors(model, index, chunk=5, mask=mask)
    np.testing.assert_allclose(known[1, 1], np.linalg.inv(alone[1])[0, 0], rtol=1e-8)


def test_bootstrap_does_not_feel_masked_pixels():
    _, counts = table()
    mask = mask_of(counts.frame_shape)
    run = lambda data: np.asarray(data.counts.dense()).sum(0)[np.asarray(mask)]
    found = [bootstrap(run, dataset_of(spoilt(counts, mask, v), mask), 2) for v in (0, 200)]
    same(found[0], found[1])


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -5, 2.0**40])
def test_files_may_hold_anything_in_masked_pixels(tmp_path, value):
    cube, mask = some_cube(dtype=np.float64), np.asarray(mask_of(FRAME))
    clean = np.where(mask, cube, 0)
    cube[:, :, ~mask] = value
    np.save(tmp_path / "scan.npy", cube)
    source = with_mask(read(tmp_path / "scan.npy"), mask)
    np.testing.assert_array_equal(source.read().dense(), clean.reshape(-1, *FRAME))
    assert check_counts(source) == ()
    assert describe(source)["total_counts"] == clean.sum()
    both = with_mask(source, np.arange(FRAME[0])[:, None] > np.zeros(FRAME[1]))
    assert both.mask is not None
    np.testing.assert_array_equal(both.mask[1:], mask[1:])
    assert not both.mask[0].any()


def test_masked_events_are_dropped(tmp_path):
    cube, mask = some_cube(), np.asarray(mask_of(FRAME))
    frames = Frames(jnp.asarray(cube.reshape(-1, *FRAME)))
    write_stempy(tmp_path / "scan.h5", events_from_frames(frames), SCAN)
    source = with_mask(read(tmp_path / "scan.h5", frame_shape=FRAME), mask)
    found = source.read(np.array([4, 11, 3]))
    np.testing.assert_array_equal(
        found.dense(int), np.where(mask, frames.dense(int)[jnp.asarray([4, 11, 3])], 0)
    )
    assert describe(source)["total_counts"] == np.where(mask, cube, 0).sum()


@pytest.mark.parametrize("center", [None, (1.2, 3.4), (2.0, 2.0)])
def test_a_series_turns_the_mask_as_its_frames(tmp_path, center):
    """Frames that are bright where the mask lets through, and nowhere else."""
    mask = np.asarray(mask_of(FRAME, part=0.4))
    np.save(tmp_path / "scan.npy", np.broadcast_to(mask, (*SCAN, *FRAME)).astype(np.uint8))
    plain = read(tmp_path / "scan.npy")
    data = load_series([plain, with_mask(plain, mask)], 0.5, center=center)
    np.testing.assert_array_equal(data.mask, data.counts.dense()[0] > 0)
    assert load_series([plain], 0.5, center=center).mask is None
    assert load_series([with_mask(plain, np.ones(FRAME, bool))], 0.5, center=center).mask is None
    with pytest.raises(InputError, match="no pixel of the frames may be used"):
        load_series([with_mask(plain, mask), with_mask(plain, ~mask)], 0.5)


def test_mask_files(tmp_path):
    mask = np.asarray(mask_of(FRAME))
    for name, values in {"b": mask, "i": mask.astype(np.int16), "f": mask * 1.0}.items():
        np.save(tmp_path / f"{name}.npy", values)
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.npy", FRAME), mask)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["entry/mask"], file["axis"] = mask.astype(np.uint8), np.arange(3)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.h5", FRAME), mask)
    with h5py.File(tmp_path / "m.h5", "a") as file:
        file["other"] = mask
    np.save(tmp_path / "numbers.npy", mask * 2)
    np.save(tmp_path / "turned.npy", mask.T)
    (tmp_path / "text.npy").write_text("1 0 1")
    for name, message in {
        "m.h5": "only dataset of two axes",
        "numbers.npy": "holds other int64",
        "turned.npy": r"shape \(6, 4\), but frames have \(4, 6\)",
        "text.npy": "cannot be read as a mask",
    }.items():
        with pytest.raises(InputError, match=rf"{name.replace('.', '[.]')}.*{message}"):
            read_mask(tmp_path / name, FRAME)


# --- experiments ----------------------------------------------------------------------------------


def write_scans(folder, cubes, mask=None, value=0):
    """EMD files with `value` at masked pixels, and the changes that put them in the experiment."""
    step, pixel = 0.5, 1e3 * sj.wavelength(80e3) * 2 / 20
    folder.mkdir()
    for i, cube in enumerate(cubes):
        cube = cube.copy() if mask is None else np.where(mask, cube, np.uint16(value))
        write_emd(folder / f"new_{i}.h5", cube, step, pixel, 80e3)
    return {f"scans.{i}.file": str(folder / f"new_{i}.h5") for i in range(len(cubes))}


def ready(file, changes):
    return workflow.prepare(from_mapping(changed(content(file), changes)))


def camera_mask(shape=(24, 24)):
    """Hot pixels in and beside the disc, and a dead line."""
    mask = np.asarray(mask_of(shape, part=0.04)).copy()
    mask[17, :] = False
    return mask


def test_an_experiment_does_not_feel_masked_pixels(experiment_file, series, tmp_path):
    mask = camera_mask()
    np.save(tmp_path / "good.npy", mask)
    few: dict[str, Any] = {"method.iterations": 2, "method.order": 2}
    few["geometry.mask"] = str(tmp_path / "good.npy")
    outcomes = []
    for value in (0, 50000):
        files = write_scans(tmp_path / str(value), series.frames, mask, value)
        prepared = ready(experiment_file, few | files)
        outcomes.append(workflow.fit(prepared, workflow.load(prepared)))
    note = f"{(~mask).sum()} of 576 pixels are left out"
    assert any(note in n and "bright-field disc" in n for n in outcomes[0].prepared.notes)
    same(*(o.result.model for o in outcomes))
    first, second = (
        {k: v for k, v in o.metrics.items() if k not in ("seconds", "peak_memory_bytes")}
        for o in outcomes
    )
    assert first == second
    whole = workflow.load(ready(experiment_file, {}))
    seen = np.where(np.fft.ifftshift(mask), whole.counts.dense(), 0).sum((1, 2)).reshape(3, -1)
    assert np.all(seen.mean(axis=1) < 0.97 * whole.dose)
    np.testing.assert_allclose(outcomes[0].dataset.dose, whole.dose, rtol=5e-3)


def test_masks_that_cannot_be_meant(experiment_file, tmp_path):
    for name, mask in {"inverted": ~camera_mask(), "stop": np.ones((24, 24), bool)}.items():
        if name == "stop":
            y, x = np.indices(mask.shape) - 12
            mask[np.hypot(y, x) < 6] = False
        np.save(tmp_path / f"{name}.npy", mask)
    for name, message in {"inverted": "is it inverted", "stop": "tell the dose"}.items():
        change = {"geometry.mask": str(tmp_path / f"{name}.npy")}
        with pytest.raises(InputError, match=f"geometry.mask.*{message}"):
            ready(experiment_file, change)
        assert (
            ready(experiment_file, change | {"accept_implausible": True}).sources[0].mask
            is not None
        )


def test_masked_events_are_compared_on_whole_frames(experiment_file, series, tmp_path):
    change = {"geometry.mask": str(tmp_path / "good.npy")}
    np.save(tmp_path / "good.npy", camera_mask())
    for i, cube in enumerate(series.frames):
        thin = sj.thin(Frames(jnp.asarray(cube.reshape(-1, 24, 24))), 0.002, 0)[0]
        write_stempy(
            tmp_path / f"e{i}.h5", events_from_frames(Frames(thin.dense(jnp.uint8))), (3, 6)
        )
        change[f"scans.{i}.file"] = str(tmp_path / f"e{i}.h5")
    prepared = ready(experiment_file, change | {"accept_implausible": True})
    data = workflow.load(prepared)
    assert isinstance(data.counts, Events)
    model = workflow.starting_model(prepared.experiment, data)
    dense = eqx.tree_at(lambda d: d.counts, data, Frames(data.counts.dense(jnp.uint8)))
    index = np.arange(4)
    loss = lambda data: jax.jit(workflow.loss(prepared.experiment, data))
    values = [loss(d)(model, batch(d, index)) for d in (data, dense)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
