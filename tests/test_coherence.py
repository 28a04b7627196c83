"""Partial coherence: rules against exact moments, models against brute force and closed forms."""

import math
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm, qmc

from smpr3d_jax.physics.coherence import (
    enough_nodes,
    enough_rings,
    gaussian_line,
    gaussian_plane,
    mixed_states,
    orthogonal_probes,
)
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import exit_waves, prepare, Scattering, unscattered
from smpr3d_jax.physics.fourier import phase_factor
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import (
    aberration_phase,
    chromatic_spread,
    focal_series,
    probe,
    pupil,
    spectra,
    wavelength,
)
from smpr3d_jax.physics.scan import raster, Scan, series_of
from smpr3d_jax.physics.simulation import simulate_series
from smpr3d_jax.physics.smatrix import Beams, disc_quadrature, scatter, to_modes
from smpr3d_jax.physics.specimen import Slices
from smpr3d_jax.physics.zernike import tilt_polynomials

from .helpers import directional_derivative, inner, random_complex, random_slices


ENERGY, SEMIANGLE, DEFOCI = 80e3, 25.0, [-40.0, 50.0]
LAMBDA = wavelength(ENERGY)
CUTOFF = SEMIANGLE * 1e-3 / LAMBDA
MIXED = np.array([[1.0, 0.1j, 0.05], [0.1, 0.4, -0.3j]])
GRID = Grid((24, 32), (0.5, 0.45))


def lens(defoci=DEFOCI, **coherence):
    return focal_series(ENERGY, SEMIANGLE, defoci, {"C12": 10.0, "C21": 150.0}, **coherence)


# The rules.


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8])
def test_nodes_on_a_line_have_the_moments_of_a_gaussian(nodes):
    place, weight = gaussian_line(nodes)
    for power in range(2 * nodes):
        exact = 0.0 if power % 2 else math.prod(range(1, power, 2))
        assert weight @ place**power == pytest.approx(exact, abs=1e-10 * 4.0**power)


@pytest.mark.parametrize(("rings", "count"), [(1, 7), (2, 17), (3, 31), (4, 49)])
def test_nodes_in_a_plane_have_the_moments_of_a_gaussian(rings, count):
    place, weight = gaussian_plane(rings)
    assert place.shape == (count, 2)
    assert weight.min() > 0
    moment = lambda n: 0.0 if n % 2 else math.prod(range(1, n, 2))
    for degree in range(2 * rings + 4):
        for y in range(degree + 1):
            found = weight @ (place[:, 0] ** y * place[:, 1] ** (degree - y))
            assert found == pytest.approx(moment(y) * moment(degree - y), abs=1e-12 * 6.0**degree)


def test_wider_distributions_get_more_nodes():
    assert [enough_nodes(s, LAMBDA, CUTOFF) for s in (0.0, 30.0, 60.0, 120.0)] == [3, 3, 5, 9]
    assert [enough_rings(s, CUTOFF) for s in (0.0, 0.3, 0.4, 0.8)] == [1, 1, 2, 3]
    chosen = lens(source=0.4, spread=60.0)
    assert (chosen.source_rings, chosen.spread_nodes, chosen.states) == (2, 5, 17 * 5)


# The states.


@pytest.mark.parametrize(
    ("coherence", "states"),
    [
        ({}, 1),
        ({"source": 0.3}, 7),
        ({"spread": 30.0, "spread_nodes": 4}, 4),
        ({"probes": MIXED}, 2),
        ({"source": 0.3, "spread": 30, "probes": MIXED}, 42),
    ],
)
def test_states_hold_one_electron_together(x64, coherence, states):
    optics = lens(**coherence)
    assert optics.states == states
    waves = probe(optics, GRID, jnp.asarray([3.3, 5.1]))
    assert waves.shape == (2, states, *GRID.shape)
    np.testing.assert_allclose(np.sum(np.abs(waves) ** 2, axis=(1, 2, 3)), 1, rtol=1e-12)
    disc = disc_quadrature(CUTOFF, 20.0)
    ky, kx = (jnp.asarray(k) for k in disc.points.T)
    power = np.abs(pupil(optics, ky, kx)) ** 2
    np.testing.assert_allclose(np.sum(power @ disc.weights, axis=1), 1, rtol=1e-12)


def test_without_partial_coherence_the_pupil_is_the_same_to_the_bit():
    optics = lens()
    ky, kx = jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 5, 6)), jnp.float32)
    chi = aberration_phase(optics.aberrations, ky, kx, ENERGY)
    np.testing.assert_array_equal(pupil(optics, ky, kx)[:, 0], phase_factor(-chi))
    text = str(jax.make_jaxpr(lambda o: pupil(o, ky, kx, jnp.ones_like(ky)))(optics))
    assert text.count(" cos") == text.count(" sin") == 1


def test_single_precision_is_kept():
    optics = lens(source=0.3, spread=30.0, probes=MIXED)
    ky = jnp.linspace(-0.5, 0.5, 7)
    assert ky.dtype == jnp.float32
    assert pupil(optics, ky, 0.5 * ky).dtype == jnp.complex64


def test_one_scan_of_a_series_keeps_its_coherence(x64):
    optics = lens(source=0.3, spread=30.0, probes=MIXED)
    k = jnp.linspace(-0.5, 0.5, 7)
    both = pupil(optics, k, 0.3 * k)
    for scan in (0, 1):
        one = optics.of_scan(jnp.asarray(scan))
        assert one.states == optics.states
        np.testing.assert_allclose(pupil(one, k, 0.3 * k)[0], both[scan], atol=1e-13)
    assert optics.of_point().states == 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": -0.1}, "`source` is -0.1 Å"),
        ({"spread": math.nan}, "`spread` is nan Å"),
        ({"source": 40.0}, "`source_rings` = 160 must lie between 1 and 32"),
        ({"spread": 3.0, "spread_nodes": 0}, "`spread_nodes` = 0"),
        ({"probes": MIXED[:, :2]}, "2 polynomials; a whole radial order has 1 or 3"),
    ],
)
def test_what_makes_no_states_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        lens(**wrong)


def test_mixed_states_scale_and_mix_freely(x64):
    """Only probes^H probes acts, and its size does not."""
    points = np.random.default_rng(1).uniform(-0.4, 0.4, (40, 2))
    q = jnp.asarray(tilt_polynomials(1, points, CUTOFF))
    density = lambda c: np.sum(np.abs(mixed_states(jnp.asarray(c), q)) ** 2, axis=0)
    turn = np.linalg.qr(random_complex(3, (2, 2)))[0]
    np.testing.assert_allclose(density(7.5 * turn @ MIXED), density(MIXED), rtol=1e-12)
    modes, share = orthogonal_probes(jnp.asarray(turn @ MIXED))
    np.testing.assert_allclose(density(modes), density(MIXED), rtol=1e-12)
    gram = np.asarray(modes) @ np.asarray(modes).conj().T
    total = np.linalg.norm(MIXED) ** 2
    np.testing.assert_allclose(gram, np.diag(np.asarray(share)) * total, atol=1e-12)
    assert share[0] > share[1]
    assert float(jnp.sum(share)) == pytest.approx(1)
    largest = np.take_along_axis(np.asarray(modes), np.abs(modes).argmax(1)[:, None], axis=1)
    np.testing.assert_allclose(largest, np.abs(largest), atol=1e-12)


def test_more_modes_than_polynomials_leave_empty_ones(x64):
    modes, share = orthogonal_probes(random_complex(0, (5, 3)))
    assert modes.shape == (5, 3)
    np.testing.assert_array_equal(share[3:], 0)
    np.testing.assert_array_equal(modes[3:], 0)


def test_polynomials_can_move_the_probe(x64):
    """exp(-2 pi i k.shift) in tilt polynomials is the probe elsewhere."""
    shift, disc = np.array([0.21, -0.13]), disc_quadrature(CUTOFF, 4.0, 12)
    q = tilt_polynomials(8, disc.points, CUTOFF)
    moved = (q * disc.weights) @ np.exp(-2j * np.pi * disc.points @ shift)
    optics = lens(probes=moved[None])
    there = probe(lens(), GRID, jnp.asarray([4.0, 5.0] + shift))
    np.testing.assert_allclose(
        probe(optics, GRID, jnp.asarray([4.0, 5.0])), there, atol=2e-4 * np.abs(there).max()
    )


@pytest.mark.parametrize(("energy", "plain"), [(80e3, 60.0), (200e3, 24.0), (300e3, 16.0)])
def test_chromatic_spread(energy, plain):
    """C_c dE/E as full width for 1.2 mm and 0.4 eV, times the relativistic factor, as rms."""
    factor = {80e3: 1.0726, 200e3: 1.1637, 300e3: 1.2269}[energy]
    found = chromatic_spread(1.2, energy, 0.4)
    assert found == pytest.approx(plain * factor / 2.354820, rel=1e-4)
    current = chromatic_spread(1.2, energy, 0.0, current_ripple=1e-6)
    assert current == pytest.approx(1.2e7 * 2e-6)
    voltage = chromatic_spread(1.2, energy, 0.0, voltage_ripple=1e-6)
    assert voltage == pytest.approx(1.2e7 * 1e-6 * factor, rel=1e-4)
    together = chromatic_spread(1.2, energy, 0.4, 1e-6, 1e-6)
    assert together == pytest.approx(math.hypot(found, current, voltage))


# Closed forms.


CELL = Grid((40, 48), (0.4, 0.4))


def grating(cycles, strength=1e-3):
    """A weak phase grating with `cycles` (y, x) in the cell, and its frequency in 1/Å."""
    y, x = CELL.coordinates()
    frequency = [c / e for c, e in zip(cycles, CELL.extent, strict=True)]
    wave = np.cos(2 * np.pi * (frequency[0] * y + frequency[1] * x))
    volts = strength / 1.0087066e-3
    return Slices(jnp.asarray(volts * wave[None]), (12.0,), CELL), np.asarray(frequency)


def modulation(optics, slices, frequency, steps=8):
    """What changes with the probe's position as exp(2 pi i Q.rho), for each pixel."""
    along = frequency / (frequency @ frequency) * np.arange(steps)[:, None] / steps
    where = Scan(jnp.asarray(along), jnp.zeros(steps, jnp.int32))
    frames = simulate_series(slices, optics, where, CELL.shape, 1, band_limit=None, soft=False)
    return np.tensordot(np.exp(-2j * np.pi * np.arange(steps) / steps), frames, 1) / steps


@pytest.mark.parametrize("source", [0.2, 0.5])
@pytest.mark.parametrize("cycles", [(3, 2), (0, 7), (-5, 6)])
def test_a_source_damps_transfer_by_its_own(x64, source, cycles):
    """A source of rms sigma multiplies the transfer of frequency Q by exp(-2 pi² sigma² Q²)."""
    slices, frequency = grating(cycles)
    coherent = modulation(lens([30.0]), slices, frequency)
    damped = modulation(lens([30.0], source=source, source_rings=6), slices, frequency)
    factor = math.exp(-2 * math.pi**2 * source**2 * float(frequency @ frequency))
    np.testing.assert_allclose(damped, factor * coherent, atol=2e-6 * np.abs(coherent).max())


@pytest.mark.parametrize("spread", [20.0, 50.0])
def test_a_spread_damps_the_interference_of_two_beams(x64, spread):
    """Where two beams h1 and h2 meet, by exp(-(pi lambda sigma (h1² - h2²))²/2)."""
    slices, frequency = grating((4, 9))
    coherent = modulation(lens([30.0]), slices, frequency)
    damped = modulation(lens([30.0], spread=spread, spread_nodes=14), slices, frequency)
    k = np.stack(np.broadcast_arrays(*CELL.frequencies()), -1)
    size = lambda h: np.linalg.norm(h, axis=-1)
    # The part exp(+i Q rho) comes from k with k + Q, and from k - Q with k: keep lone pairs.
    first, second = k + frequency, k - frequency
    inside = [size(h) < CUTOFF for h in (first, k, second)]
    checked = 0
    for other, alone in ((first, inside[0] & ~inside[2]), (second, inside[2] & ~inside[0])):
        lone = alone & inside[1] & (np.abs(coherent) > 1e-3 * np.abs(coherent).max())
        apart = size(other)[lone] ** 2 - size(k)[lone] ** 2
        factor = np.exp(-((math.pi * LAMBDA * spread * apart) ** 2) / 2)
        np.testing.assert_allclose(damped[lone] / coherent[lone], factor, rtol=1e-4, atol=1e-5)
        checked += lone.sum()
    assert checked > 20


@pytest.mark.parametrize("coherence", [{"source": 0.4}, {"spread": 40.0}])
def test_vacuum_shows_the_same_disc(x64, coherence):
    nothing = Slices(jnp.zeros((1, *CELL.shape)), (12.0,), CELL)
    where = Scan(jnp.asarray([[3.0, 4.0], [5.5, 1.0]]), jnp.asarray([0, 1], jnp.int32))
    frames = [
        simulate_series(nothing, optics, where, (20, 24), 2)
        for optics in (lens(), lens(**coherence))
    ]
    np.testing.assert_allclose(frames[1], frames[0], atol=1e-13)


# Brute force.


def blurred_series(slices, where, source, spread, count, **settings):
    """Coherent frames, averaged over `count` draws of position and defocus for each frame."""
    draws = norm.ppf(qmc.Sobol(3, rng=3).random(count))
    positions = where.positions[:, None] + source * jnp.asarray(draws[None, :, :2])
    many = lens([d + spread * x for d in DEFOCI for x in draws[:, 2]])
    series = where.series[:, None] * count + jnp.arange(count, dtype=jnp.int32)[None]
    each = Scan(positions.reshape(-1, 2), series.reshape(-1))
    frames = jnp.asarray(simulate_series(slices, many, each, chunk=1, **settings))
    return frames.reshape(-1, count, *frames.shape[1:]).mean(1)


@pytest.mark.parametrize(
    ("source", "spread"), [(0.4, 0.0), (0.0, 40.0), (0.3, 30.0)], ids=["source", "spread", "both"]
)
def test_states_are_the_mean_over_many_probes(x64, source, spread):
    slices = random_slices((24, 32), (0.5, 0.45), (5.0, 40.0), strength=200.0)
    where = Scan(jnp.asarray([[4.0, 5.0], [7.3, 3.1]]), jnp.asarray([0, 1], jnp.int32))
    settings = {"detector_shape": (12, 16), "bin": 2}
    coherence = {"source": source or None, "spread": spread or None}
    found = simulate_series(slices, lens(**coherence), where, **settings)
    expected = blurred_series(slices, where, source, spread, 256, **settings)
    coherent = simulate_series(slices, lens(), where, **settings)
    effect = np.linalg.norm(coherent - expected)
    assert effect > 0.02 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 0.03 * effect


# The forward model.


CAMERA = Detector((20, 24), 3.2, 1)
FRAMES = jnp.asarray([4, 11])
frames_of = eqx.filter_jit(lambda model, index: model(index))


@cache
def scattered(pixel):
    """Beams of a strong object, and their tilt modes, made once for a size of detector pixels."""
    window = Detector(CAMERA.shape, pixel, 1).window(LAMBDA)
    slices = random_slices((40, 48), window.sampling, (5.0, 40.0), strength=80.0)
    beams = scatter(slices, window, ENERGY, lens().cutoff, 20.0)
    return slices.grid.extent, beams, to_modes(beams, 2)


def model(representation, coherence, camera=CAMERA):
    """Two scans of 2 x 3 positions in the middle of a field with room for the source."""
    optics = lens(**coherence)
    extent, beams, modes = scattered(float(camera.pixel))
    specimen = beams if representation == "beams" else modes
    rng = np.random.default_rng(2)
    middle = np.asarray(extent) / 2
    places = [middle + raster((2, 3), (0.9, 0.7)) + rng.normal(0, 0.1, (6, 2)) for _ in DEFOCI]
    dose, share = jnp.asarray([1e3, 2e3]), jnp.asarray(rng.uniform(0.8, 1.2, 12))
    whole = Scattering(optics, specimen, series_of(places), camera, dose, exposure=share)
    return prepare(whole, moving=("optics",)) if representation == "ladder" else whole


LEAVES = {
    "spread": (lambda m: m.optics.spread, 1e-3),
    "probes": (lambda m: m.optics.probes, 1e-5),
    "source": (lambda m: m.optics.source, 1e-5),
    "blur": (lambda m: m.detector.blur, 1e-5),
    "background": (lambda m: m.detector.background, 1e-5),
    "C10": (lambda m: m.optics.aberrations["C10"], 1e-3),
}


@pytest.mark.parametrize("representation", ["modes", "ladder", "beams"])
def test_gradients_agree_with_finite_differences(x64, representation):
    """All leaves at once: 42 states, blurred, over a background."""
    # Of a fixed type, as they are once they have been moved, so that one compilation does.
    level, width = (jnp.asarray(a, float) for a in (0.1, 0.6))
    spoilt: dict[str, Any] = {"background": level, "blur": width}
    camera = Detector(CAMERA.shape, CAMERA.pixel, 1, **spoilt)
    whole = model(representation, {"source": 0.25, "spread": 30.0, "probes": MIXED}, camera)
    assert whole.optics.states == 42
    moving = jax.tree.map(lambda _: True, whole)
    seen = frames_of(whole, FRAMES)
    target = seen * jnp.asarray(np.random.default_rng(8).uniform(0.5, 1.5, seen.shape))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model):
        intensity = model.refreshed(moving)(FRAMES)
        return jnp.sum(intensity - target * jnp.log(intensity))

    gradient = loss(whole)[1]
    for name, (where, step) in LEAVES.items():
        leaf = where(whole)
        # Along a ladder probes move in steps: see the tests below.
        if (representation, name) == ("ladder", "source"):
            continue
        direction = random_complex(9, leaf.shape)
        direction = direction if jnp.iscomplexobj(leaf) else direction.real
        value = lambda leaf, where=where: loss(eqx.tree_at(where, whole, leaf))[0]
        expected = directional_derivative(value, leaf, direction, step)
        found = inner(jnp.conj(where(gradient)), direction).real
        assert found == pytest.approx(expected, rel=2e-5), name


def test_a_source_on_the_ladder_is_that_of_its_own_beamlets(x64):
    """It needs no rungs more, and differs by the rounding of positions."""
    coherence = {"source": 0.3, "spread": 30.0}
    exact = model("modes", coherence, Detector(CAMERA.shape, 2.0, 1))
    ladder = prepare(exact)
    coherent = prepare(
        eqx.tree_at(lambda m: m.optics, exact, lens(spread=30.0)), moving=("optics",)
    )
    sizes = [sum(a.size for a in jax.tree.leaves(m.plan)) for m in (ladder, coherent)]
    assert sizes[0] == sizes[1]
    index = jnp.arange(12)
    assert eqx.filter_eval_shape(exit_waves, ladder, index).shape[1] == 21
    wanted = np.asarray(frames_of(exact, index))
    error = lambda m: np.linalg.norm(frames_of(m, index) - wanted) / np.linalg.norm(wanted)
    assert error(ladder) < 0.5 * error(coherent)


def test_a_source_on_the_ladder_is_pulled_to_its_size(x64):
    """Towards 0.4 Å from both sides, as strongly as without the rounding of positions."""
    exact = model("modes", {"source": 0.3}, Detector(CAMERA.shape, 2.0, 1))
    index = jnp.arange(12)
    with_source = lambda model, size: eqx.tree_at(lambda m: m.optics.source, model, size)
    target = eqx.filter_jit(lambda m: m(index))(with_source(exact, jnp.asarray(0.4)))

    @eqx.filter_jit
    def slope(model, size):
        def loss(size):
            seen = with_source(model, size)(index)
            return jnp.sum(seen - target * jnp.log(seen + 0.01))

        return jax.grad(loss)(size)

    for size, sign in ((0.1, -1), (0.5, 1)):
        wanted, found = (float(slope(m, jnp.asarray(size))) for m in (exact, prepare(exact)))
        assert np.sign(wanted) == sign
        assert found == pytest.approx(wanted, rel=0.05)


def test_a_field_too_small_for_its_source_is_refused():
    positions = series_of([raster((3, 4), (0.5, 0.4))] * 2)
    dose = jnp.ones(2)
    roomy = unscattered(lens(source=0.5), CAMERA, positions, dose, 20.0, 2)
    assert prepare(roomy).plan is not None
    tight = unscattered(lens(), CAMERA, positions, dose, 20.0, 2)
    tight = eqx.tree_at(lambda m: m.optics, tight, lens(source=0.8))
    with pytest.raises(ValueError, match="source moves probes by up to"):
        prepare(tight)


def test_beams_with_states_agree_with_simulated_frames(x64):
    """On a cell as large as the window both are exact."""
    whole, slices = periodic(source=0.3, spread=30.0, probes=MIXED)
    frames = simulate_series(
        slices, whole.optics, whole.scan, CAMERA.shape, 1, dose=1e4, band_limit=None, soft=False
    )
    np.testing.assert_allclose(frames_of(whole, jnp.arange(12)), frames, rtol=1e-8, atol=1e-8)


def periodic(**coherence):
    """Beams of a cell as large as the window, repeated to make a field, and its slices."""
    optics = lens(**coherence)
    window = CAMERA.window(optics.wavelength)
    slices = random_slices(window.shape, window.sampling, (5.0, 40.0), strength=100.0)
    cell = scatter(slices, window, ENERGY, optics.cutoff, 20.0)
    field = Grid((3 * window.shape[0], 3 * window.shape[1]), window.sampling)
    corner = (-window.extent[0], -window.extent[1])
    waves = jnp.tile(cell.waves, (1, 3, 3))
    beams = Beams(waves, field, window, corner, cell.plane, cell.cutoff)
    rng = np.random.default_rng(1)
    middle, step = np.asarray(window.extent) / 2, np.asarray(window.sampling) * [3.3, 3.6]
    places = [middle + raster((2, 3), tuple(step)) + rng.normal(0, 0.1, (6, 2)) for _ in DEFOCI]
    return Scattering(optics, beams, series_of(places), CAMERA, jnp.full(2, 1e4)), slices


def test_both_widths_are_found_from_wrong_values(x64):
    """Data of a source of 0.4 Å and a spread of 40 Å, brute force; the specimen is known."""
    whole, slices = periodic(source=0.5, spread=25.0)
    assert (whole.optics.source_rings, whole.optics.spread_nodes) == (2, 3)
    frames = blurred_series(
        slices, whole.scan, 0.4, 40.0, 128,
        detector_shape=CAMERA.shape, bin=1, dose=1e4, band_limit=None, soft=False,
    )  # fmt: skip
    planned = prepare(whole, chunk=np.arange(12)[None], moving=("optics",))

    @jax.jit
    @jax.value_and_grad
    def loss(widths):
        where = lambda m: (m.optics.source, m.optics.spread)
        moved = eqx.tree_at(where, planned, (widths[0], 100 * widths[1]))
        intensity = moved(jnp.arange(12))
        return jnp.sum(intensity - frames * jnp.log(intensity + 1e-6)) / 12

    at = lambda widths: [np.asarray(a, float) for a in loss(jnp.asarray(widths))]
    found = minimize(at, [0.5, 0.25], jac=True, method="L-BFGS-B", options={"maxiter": 15}).x
    assert found[0] == pytest.approx(0.4, rel=0.05)
    assert found[1] == pytest.approx(0.4, rel=0.05)


def test_spectra_follow_the_hard_edge_too(x64):
    inside = np.hypot(*GRID.frequencies()) <= CUTOFF
    waves = spectra(lens(source=0.2), GRID, float, soft=False)
    np.testing.assert_array_equal(np.any(np.abs(waves) > 0, axis=(0, 1)), inside)
