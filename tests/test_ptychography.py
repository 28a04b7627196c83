"""Objects in slices: frames against numpy, whatever lights them, and reconstructions of truth."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.app.ptychography import compare_halves, halves
from smpr3d_jax.data.counts import compare, Frames
from smpr3d_jax.data.dataset import batch, Dataset
from smpr3d_jax.inverse import constraints, losses, pie
from smpr3d_jax.inverse.batches import _hilbert, groups
from smpr3d_jax.inverse.epochs import reconstruct_in_epochs
from smpr3d_jax.inverse.updates import Beat, named_leaves, per_leaf
from smpr3d_jax.physics import ptychography as pt
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import prepare, Scattering
from smpr3d_jax.physics.optics import focal_series, interaction_parameter, wavelength
from smpr3d_jax.physics.scan import raster, Scan
from smpr3d_jax.physics.smatrix import field

from .helpers import directional_derivative, random_complex


ENERGY, SEMIANGLE, DOSE = 80e3, 25.0, 2e4
SHAPE = (24, 32)
DEPTHS = (10.0, 40.0, 60.0)


def empty(
    kind: pt.Kind = "transmission",
    step=(1.05, 0.9),
    shape=(5, 4),
    depths=DEPTHS,
    states=1,
    **static,
):
    """A model of nothing: a scan that is not square, seen by a camera that is not."""
    detector = Detector(SHAPE, 3.3, integration=1)
    optics = focal_series(ENERGY, SEMIANGLE, [60.0])
    positions = raster(shape, step)
    scan = Scan(jnp.asarray(positions, float), jnp.zeros(len(positions), jnp.int32))
    grid, origin = field(positions, detector.window(optics.wavelength), 2)
    specimen = pt.empty_object(grid, origin, depths, kind, states, **static)
    return Scattering(optics, specimen, scan, detector, jnp.asarray([DOSE]))


def filled(model, strength=0.3, seed=0):
    """With a smooth object in it, the same whatever the parametrisation."""
    specimen, rng = model.specimen, np.random.default_rng(seed)
    ky, kx = specimen.grid.frequencies()
    low = np.exp(-((np.hypot(ky, kx) / 0.25) ** 2))
    noise = rng.normal(size=specimen.values.shape)
    phase = np.fft.ifft2(np.fft.fft2(noise) * low).real
    phase = strength * phase / phase.std()
    scale = interaction_parameter(ENERGY) if specimen.kind == "potential" else 1.0
    values = np.exp(1j * phase) if specimen.kind == "transmission" else phase / scale
    dtype = specimen.values.dtype
    return eqx.tree_at(lambda m: m.specimen.values, model, jnp.asarray(values, dtype))


def pixels(model, states=1):
    light = pt.pixel_probes(
        model.optics, model.window, model.dose, float(model.specimen.depths[0]), states
    )
    return dataclasses.replace(model, illumination=light)


def lit(model) -> pt.Illumination:
    """What lights a model in pixels."""
    assert model.illumination is not None
    return model.illumination


def in_numpy(model):
    """All frames by the textbook, in float64: a frame, a state, a slice at a time."""
    specimen, window = model.specimen, model.window
    t = np.asarray(specimen.transmission(ENERGY), complex)
    modes = np.asarray(lit(model).modes[0], complex)
    ky, kx = window.frequencies()
    frames = []
    for at, position in enumerate(np.asarray(model.scan.positions, float)):
        pixel = (position - specimen.origin) / window.sampling
        corner = np.floor(pixel + 0.501).astype(int) - np.array(SHAPE) // 2
        rest = (pixel - np.floor(pixel + 0.501)) * window.sampling
        ramp = np.exp(-2j * np.pi * (ky * rest[0] + kx * rest[1]))
        tilt = np.tan(np.atleast_2d(np.asarray(specimen.tilt, float))[at % len(specimen.tilt)
                                    if specimen.tilt.ndim == 2 else 0] * 1e-3)  # fmt: skip
        total = 0.0
        for o, share in enumerate(np.asarray(specimen.shares, float)):
            wave = np.fft.ifft2(np.fft.fft2(modes) * ramp)
            for s, z in enumerate(specimen.depths):
                rows = slice(corner[0], corner[0] + SHAPE[0])
                wave = wave * t[o, s, rows, corner[1] : corner[1] + SHAPE[1]]
                if s + 1 < len(specimen.depths):
                    gap = float(specimen.depths[s + 1] - z)
                    turn = np.pi * wavelength(ENERGY) * (ky**2 + kx**2)
                    turn = turn + 2 * np.pi * (ky * tilt[0] + kx * tilt[1])
                    wave = np.fft.ifft2(np.fft.fft2(wave) * np.exp(-1j * gap * turn))
            total = total + share * (np.abs(np.fft.fft2(wave, norm="ortho")) ** 2).sum(axis=0)
        frames.append(total)
    return np.stack(frames)


@pytest.mark.parametrize("kind", ["transmission", "phase", "potential"])
@pytest.mark.parametrize("tilt", [(0.0, 0.0), (5.0, -3.0), "each"])
def test_frames_are_the_textbooks(x64, kind, tilt):
    model = pixels(filled(empty(kind)), 2)
    own = np.random.default_rng(1).normal(0, 4, (20, 2)) if tilt == "each" else tilt
    model = eqx.tree_at(lambda m: m.specimen.tilt, model, jnp.asarray(own))
    index = jnp.arange(20)
    np.testing.assert_allclose(model(index), in_numpy(model), rtol=1e-9, atol=1e-9)
    planned = prepare(model)
    np.testing.assert_allclose(planned(index), in_numpy(model), rtol=1e-9, atol=1e-9)


def test_parametrisations_agree_and_absorb(x64):
    frames = [pixels(filled(empty(kind)))(jnp.arange(3)) for kind in ("phase", "potential")]
    np.testing.assert_allclose(frames[0], pixels(filled(empty()))(jnp.arange(3)), rtol=1e-9)
    np.testing.assert_allclose(frames[0], frames[1], rtol=1e-9)
    dark = empty("phase", absorbing=True, depths=(0.0,))
    dark = eqx.tree_at(lambda m: m.specimen.values, dark, dark.specimen.values + 0.1j)
    share = pixels(dark)(jnp.arange(2)).sum() / pixels(empty(depths=(0.0,)))(jnp.arange(2)).sum()
    np.testing.assert_allclose(share, np.exp(-0.2), rtol=1e-9)


def test_states_of_the_object_add(x64):
    model = pixels(filled(empty(states=2)), 2)
    np.testing.assert_allclose(model(jnp.arange(20)), in_numpy(model), rtol=1e-9, atol=1e-9)


def test_the_lens_lights_as_its_probe_in_pixels_does(x64):
    model = filled(empty())
    np.testing.assert_allclose(
        model(jnp.arange(4)), pixels(model)(jnp.arange(4)), rtol=1e-9, atol=1e-9
    )
    # Focused where its defocus says: the probe is smallest there.
    width = lambda z: float(jnp.abs(pt.illuminate(
        model.optics, model.window, model.dose, z)[0, 0]).max())  # fmt: skip
    assert width(60.0) > max(width(30.0), width(90.0))


def test_further_states_are_orthogonal_and_share_the_dose(x64):
    modes = np.asarray(lit(pixels(empty(), 4)).modes[0]).reshape(4, -1)
    gram = modes.conj() @ modes.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9 * DOSE)
    np.testing.assert_allclose(np.real(np.diag(gram)) / DOSE, [0.85, 0.05, 0.05, 0.05], rtol=1e-9)
    first = np.asarray(lit(pixels(empty())).modes[0, 0]).ravel()
    assert abs(np.vdot(first, modes[0])) / np.linalg.norm(first) ** 2 > 0.9


def test_a_probe_that_changes_from_frame_to_frame(x64):
    model = pixels(filled(empty()), 2)
    more = jnp.asarray(random_complex(0, (2, *SHAPE))) * 3
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
    light = pt.Illumination(lit(model).modes, more, weights)
    varied = prepare(dataclasses.replace(model, illumination=light))(jnp.arange(20))
    for j in (0, 7):
        modes = lit(model).modes.at[0, 0].add(jnp.tensordot(weights[j].astype(more.dtype), more, 1))
        one = dataclasses.replace(model, illumination=pt.Illumination(modes))
        np.testing.assert_allclose(varied[j], one(jnp.arange(20))[j], rtol=1e-9, atol=1e-9)


def counted(model, key=0):
    """What a camera would count of a model, as a dataset."""
    frames = np.asarray(jax.jit(lambda m: m(jnp.arange(len(m.scan.positions))))(model), float)
    counts = np.random.default_rng(key).poisson(frames).astype(np.uint16)
    rows = len(np.unique(np.asarray(model.scan.positions)[:, 0].round(6)))
    shape = (rows, len(frames) // rows)
    return Dataset(Frames(jnp.asarray(counts)), model.scan, (shape,))


@pytest.mark.parametrize("planned", [True, False])
def test_the_quick_mean_is_the_mean(x64, planned):
    model = pixels(filled(empty()), 2)
    camera = Detector(SHAPE, 3.3, 2, background=jnp.asarray(0.2), blur=jnp.asarray(0.6))
    share = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, 20))
    model = dataclasses.replace(model, detector=camera, exposure=share)
    own = jnp.asarray(np.random.default_rng(1).normal(0, 4, (20, 2)))
    model = eqx.tree_at(lambda m: m.specimen.tilt, model, own)
    frames = batch(counted(model), np.array([3, 0, 17]))
    mask = jnp.asarray(np.random.default_rng(2).random(SHAPE) < 0.9)
    frames = dataclasses.replace(frames, mask=mask)
    model = prepare(model) if planned else model
    noise = losses.poisson()
    slow = lambda m: jnp.mean(compare(noise, m(frames.index), frames.counts, frames.mask))
    quick = lambda m: losses.objective(noise)(m, frames)
    free, fixed = eqx.partition(model, eqx.is_inexact_array)
    found, truth = (
        jax.jit(jax.value_and_grad(lambda free, f=f: f(eqx.combine(free, fixed))))(free)
        for f in (quick, slow)
    )
    np.testing.assert_allclose(found[0], truth[0], rtol=1e-10)
    for name, slope in named_leaves(truth[1]).items():
        other = named_leaves(found[1])[name]
        if slope is not None:
            np.testing.assert_allclose(
                other, slope, atol=1e-9 * float(jnp.abs(slope).max() + 1), err_msg=name
            )


@pytest.mark.parametrize("leaf", ["values", "modes", "positions", "depths", "tilt"])
def test_slopes_are_those_of_finite_differences(x64, leaf):
    model = pixels(filled(empty("phase")))
    data = batch(counted(model), np.arange(20))
    where = {
        "values": lambda m: m.specimen.values, "modes": lambda m: m.illumination.modes,
        "positions": lambda m: m.scan.positions, "depths": lambda m: m.specimen.depths,
        "tilt": lambda m: m.specimen.tilt,
    }[leaf]  # fmt: skip
    start = where(model) + 0.01
    loss = lambda value: losses.objective(losses.poisson())(eqx.tree_at(where, model, value), data)
    way = np.random.default_rng(0).normal(size=start.shape)
    way = jnp.asarray(way + (1j * way[..., ::-1] if leaf == "modes" else 0), start.dtype)
    slope = jnp.sum((jnp.conj(jnp.conj(jax.grad(loss)(start))) * way).real)
    truth = directional_derivative(loss, start, way, 1e-5)
    np.testing.assert_allclose(slope, truth, rtol=2e-5)


def test_memory_or_time(x64):
    model, less = (pixels(filled(empty(keep=keep))) for keep in (True, False))
    frames = jnp.arange(5)
    total = eqx.filter_jit(eqx.filter_grad(lambda m: jnp.sum(m(frames) ** 2)))
    slope = lambda m: total(m).specimen.values
    np.testing.assert_allclose(slope(model), slope(less), rtol=1e-9, atol=1e-6)


def reconstructed(truth, rule, epochs, start, **options):
    data = counted(truth)
    return data, reconstruct_in_epochs(
        prepare(start), data, losses.objective(losses.amplitude()), rule,
        epochs=epochs, batch_size=10, held_out=np.array([33, 71]), **options,
    )  # fmt: skip


def scanned(kind: Any = "phase", depths=(0.0, 60.0), states=1):
    """10 x 9 positions, close enough for an object to be found."""
    return pixels(empty(kind, (1.6, 1.4), (10, 9), depths), states)


def likeness(model, truth):
    """Correlation of the phases of all slices together, where the scan went."""
    rows = np.asarray(model.scan.positions) - np.asarray(model.specimen.origin)
    low, high = (rows / model.window.sampling).min(0), (rows / model.window.sampling).max(0)
    cut = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    found, right = (
        np.asarray(m.specimen.phase(ENERGY)[0]).sum(axis=0)[cut] for m in (model, truth)
    )
    return np.corrcoef(found.ravel(), right.ravel())[0, 1]


@pytest.mark.parametrize("rule", ["rpie", "epie", "lsqml"])
def test_an_object_is_found_again(rule):
    truth = filled(scanned(), 0.4)
    noise = losses.amplitude()
    rules = {"rpie": pie.rpie(noise), "epie": pie.epie(noise), "lsqml": pie.lsqml(noise)}
    _, result = reconstructed(truth, rules[rule], 24, scanned())
    # ePIE takes short steps wherever light is weaker than at its brightest.
    assert likeness(result.model, truth) > (0.75 if rule == "epie" else 0.98)
    deviance, noise = (result.history[f"{k}_held_out"] for k in ("deviance", "noise"))
    left = (deviance[-1] - noise[-1]) / (deviance[0] - noise[0])
    assert left < (0.8 if rule == "epie" else 0.25)


def test_halves_of_the_frames_agree_where_there_is_signal():
    truth = filled(scanned(depths=(0.0,)), 0.4)
    data, rule = counted(truth), pie.rpie(losses.amplitude())
    parts = halves(data, np.setdiff1d(np.arange(90), [33, 71]))
    assert sorted(np.concatenate(parts)) == sorted(set(range(90)) - {33, 71})
    models = [
        reconstruct_in_epochs(
            prepare(scanned(depths=(0.0,))), data, losses.objective(losses.amplitude()), rule,
            epochs=20, batch_size=11, training=part,
        ).model
        for part in parts
    ]  # fmt: skip
    found = compare_halves(models)
    # The object was made of frequencies up to about 0.4 1/Å, nothing lies beyond 0.8.
    radius, curve = (np.asarray(found[k]) for k in ("radius_per_A", "correlation"))
    assert curve[(radius > 0.08) & (radius < 0.35)].mean() > 0.8
    assert curve[radius > 0.8].mean() < 0.5
    assert 1 / 0.9 < found["resolution_A"] < 1 / 0.3


def test_positions_move_once_an_epoch_and_held_out_ones_follow():
    truth = filled(scanned(depths=(0.0,)), 0.6)
    rng = np.random.default_rng(0)
    away = rng.normal(0, 0.25, (90, 2))
    away -= away.mean(0)
    moved = eqx.tree_at(lambda m: m.scan.positions, truth, truth.scan.positions + away)
    start = eqx.tree_at(lambda m: m.scan.positions, scanned(depths=(0.0,)), truth.scan.positions)
    import optax

    noise = losses.amplitude()
    rules = pie.rpie(noise).optimisers | {"scan.positions": optax.adam(0.04)}
    rules = per_leaf(rules, {"scan.positions": Beat(3, 1)}, own=("scan.positions",))
    start = dataclasses.replace(start, plan=None)
    data = counted(moved)
    result = reconstruct_in_epochs(
        start, data, losses.objective(noise), rules, epochs=30, batch_size=10,
        held_out=np.array([33, 71]), constraints=(constraints.centred_probe,),
    )  # fmt: skip
    left = np.asarray(result.model.scan.positions - moved.scan.positions)
    left = left - left.mean(0)
    assert np.sqrt((left**2).mean()) < 0.35 * np.sqrt((away**2).mean())
    assert np.hypot(*left[[33, 71]].T).mean() < 0.6 * np.hypot(*away[[33, 71]].T).mean()


def test_runs_repeat_and_go_on():
    truth, noise = filled(scanned(depths=(0.0,))), losses.amplitude()
    rule = pie.rpie(noise)
    _, whole = reconstructed(truth, rule, 4, scanned(depths=(0.0,)))
    data, half = reconstructed(truth, rule, 2, scanned(depths=(0.0,)))
    rest = reconstruct_in_epochs(
        half.model, data, losses.objective(noise), rule, epochs=2, batch_size=10,
        held_out=np.array([33, 71]), state=half.state, done=2,
    )  # fmt: skip
    np.testing.assert_array_equal(rest.model.specimen.values, whole.model.specimen.values)


def test_an_optimiser_must_not_mix_what_moves_at_different_times():
    import optax

    mixed = per_leaf({("specimen.values", "scan.positions"): optax.sgd(1e-3)},
                     own=("scan.positions",))  # fmt: skip
    with pytest.raises(ValueError, match="optimiser of its own"):
        reconstructed(filled(scanned()), mixed, 1, scanned())


@pytest.mark.parametrize("size", [0, 100])
def test_batches_that_cannot_be(size):
    model = scanned()
    with pytest.raises(ValueError, match=f"batch_size {size} must lie between 1 and the 90"):
        reconstruct_in_epochs(
            model, counted(model), losses.objective(losses.amplitude()),
            pie.rpie(losses.amplitude()), epochs=1, batch_size=size,
        )  # fmt: skip


@pytest.mark.parametrize("grouping", ["random", "compact", "hilbert"])
def test_each_epoch_visits_every_frame_once(grouping):
    positions, rng = raster((12, 8), (1.0, 1.0)), np.random.default_rng(0)
    rows = groups(positions, np.arange(96), 8, grouping, rng)
    assert sorted(rows.ravel()) == list(range(96))
    spread = np.mean([np.ptp(positions[row], axis=0).mean() for row in rows])
    assert {"random": 5, "compact": 0, "hilbert": 6}[grouping] < spread
    assert spread < {"random": 9.5, "compact": 4, "hilbert": 9.5}[grouping]


def test_neighbours_on_the_curve_are_neighbours():
    y, x = np.mgrid[:16, :16]
    positions = np.stack([y, x], axis=-1).reshape(-1, 2) * (1023 / 15)
    along = positions[np.argsort(_hilbert(positions, 4))] / (1023 / 15)
    np.testing.assert_allclose(np.abs(np.diff(along, axis=0)).sum(axis=1), 1)


def test_unknown_groupings_are_refused():
    with pytest.raises(ValueError, match="'sparse'; known are"):
        groups(np.zeros((4, 2)), np.arange(4), 2, "sparse", np.random.default_rng(0))


# Constraints: what changes nothing that can be seen, and what does.


@pytest.mark.parametrize("kind", ["phase", "transmission"])
def test_gauges_change_no_frame(x64, kind):
    model = pixels(filled(empty(kind), 0.2), 2)
    away = jnp.roll(lit(model).modes, (1, -2), axis=(2, 3))
    mixing = np.linalg.qr(random_complex(0, (2, 2)))[0]
    away = jnp.einsum("ab,sbyx->sayx", jnp.asarray(mixing), away)
    model = eqx.tree_at(lambda m: m.illumination.modes, model, away)
    index = jnp.arange(20)
    np.testing.assert_allclose(constraints.orthogonal_modes(model)(index), model(index), atol=1e-8)
    modes = np.asarray(lit(constraints.orthogonal_modes(model)).modes[0]).reshape(2, -1)
    assert abs(np.vdot(modes[0], modes[1])) < 1e-8 * DOSE
    centred = constraints.centred_probe(model)
    power = np.sum(np.abs(np.asarray(lit(centred).modes[0])) ** 2, axis=0)
    for axis, n in enumerate(SHAPE):
        turn = np.exp(2j * np.pi * (np.arange(n) - n // 2) / n)
        assert abs(np.angle(power.sum(axis=1 - axis) @ turn)) < 1e-3
    # The object moves with the probe; what is left comes from the probe's tails beyond the window.
    off = lambda m: float(jnp.linalg.norm(m(index) - model(index)) / jnp.linalg.norm(model(index)))
    alone = eqx.tree_at(lambda m: m.illumination, model, centred.illumination)
    assert off(centred) < 0.15 * off(alone)


def test_what_constraints_promise(x64):
    rng = np.random.default_rng(0)
    model = pixels(filled(empty("phase", absorbing=True)), 2)
    noisy = model.specimen.values + jnp.asarray(random_complex(0, model.specimen.values.shape))
    model = eqx.tree_at(lambda m: m.specimen.values, model, noisy)
    assert float(constraints.positive_phase(model).specimen.values.real.min()) == 0
    quiet = constraints.no_gain(model).specimen
    assert float(jnp.abs(quiet.transmission(ENERGY)).max()) <= 1 + 1e-12
    np.testing.assert_allclose(quiet.values.real, noisy.real)
    same = constraints.equal_slices(model).specimen.values
    np.testing.assert_allclose(same, jnp.broadcast_to(noisy.mean(axis=1)[:, None], same.shape))
    blurred = constraints.smooth_slices(model, 0.7).specimen.values
    flat = jnp.ones_like(noisy) * noisy[:, :1]
    even = eqx.tree_at(lambda m: m.specimen.values, model, flat)
    np.testing.assert_allclose(constraints.smooth_slices(even).specimen.values, flat)
    assert float(jnp.abs(blurred).std()) < float(jnp.abs(noisy).std())
    loud = eqx.tree_at(
        lambda m: m.illumination.modes, model,
        lit(model).modes + jnp.asarray(rng.normal(size=(1, 2, *SHAPE)), complex),
    )  # fmt: skip
    power = jnp.abs(lit(constraints.fixed_probe_intensity(loud)).modes) ** 2
    np.testing.assert_allclose(power.sum(), DOSE)
    spectrum = np.fft.fft2(np.asarray(lit(constraints.probe_in_aperture(loud)).modes))
    radius = np.hypot(*model.window.frequencies())
    assert np.abs(spectrum[..., radius > 1.05 * model.optics.cutoff]).max() < 1e-9


def test_bad_objects_are_refused():
    model = empty()
    with pytest.raises(ValueError, match="must increase and not be empty"):
        pt.empty_object(model.specimen.grid, (0.0, 0.0), [3.0, 1.0])
    with pytest.raises(ValueError, match="must be complex"):
        dataclasses.replace(model.specimen, values=model.specimen.values.real)
    with pytest.raises(ValueError, match="0 < alpha <= 1"):
        pie.scale_by_light(losses.amplitude(), 0.0)


def test_the_smatrix_of_an_object_is_that_of_its_layers(x64):
    from smpr3d_jax.physics.layers import empty_layers, to_smatrix

    model = filled(empty("potential"))
    specimen, cutoff = model.specimen, model.optics.cutoff
    layers = empty_layers(specimen.grid, specimen.origin, np.asarray(DEPTHS), 30.0, cutoff)
    layers = eqx.tree_at(lambda m: m.potential, layers, specimen.values[0])
    truth = to_smatrix(layers, ENERGY, order=4)
    found = pt.tilt_waves(specimen, ENERGY, cutoff, 30.0, 4)
    np.testing.assert_allclose(found.waves, truth.waves, atol=1e-10)
