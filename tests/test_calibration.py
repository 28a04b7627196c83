"""What calibration measures, against discs, deflections and weak objects that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.calibration import (
    contrast,
    explained,
    find_disc,
    find_orientation,
    fit_lens,
    fit_shifts,
    gather_signals,
    Lens,
    measure_shifts,
    overlaps,
    Shifts,
    Signals,
    step_from_lattice,
)
from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read
from smpr3d_jax.data.readers.stempy import write_stempy
from smpr3d_jax.physics.optics import aberration_phase, wavelength
from smpr3d_jax.physics.scan import raster

from .scan_files import some_cube


ENERGY, ANGLE, STEP = 80e3, 20.0, (0.9, 0.7)
SCAN = (26, 34)


def disc(shape, center, radius, level=20.0, outside=0.4, ellipse=(0.0, 0.0), blur=1.0):
    """A disc with an edge `blur` pixels wide."""
    y, x = (np.arange(n) - c for n, c in zip(shape, center, strict=True))
    turn = np.arctan2(y[:, None], x)
    edge = radius * (1 + ellipse[0] * np.cos(2 * turn) + ellipse[1] * np.sin(2 * turn))
    inside = np.clip((edge - np.hypot(y[:, None], x)) / blur + 0.5, 0, 1)
    return outside + (level - outside) * inside


@pytest.mark.parametrize(
    ("shape", "center", "radius", "blur"),
    [((50, 52), (24.3, 25.8), 14.4, 1.0), ((64, 40), (30.1, 19.6), 12.4, 3.0),
     ((128, 96), (70.25, 41.5), 33.3, 2.0)],
)  # fmt: skip
@pytest.mark.parametrize("slope", [0.0, 0.15])
def test_the_disc_is_found_in_noise(shape, center, radius, blur, slope):
    uneven = 1 + slope / radius * (np.arange(shape[1]) - center[1])
    pattern = disc(shape, center, radius, blur=blur) * uneven
    counts = np.random.default_rng(0).poisson(60 * pattern) / 60
    found = find_disc(counts)
    np.testing.assert_allclose(found.center, center, atol=0.06)
    assert found.radius == pytest.approx(radius, abs=0.06)
    assert np.hypot(*found.ellipse) < 5e-3
    assert 1e-4 < found.center_sigma < 0.05 and 1e-4 < found.radius_sigma < 0.05


def test_standard_errors_of_a_disc_are_those_of_many_draws():
    pattern = disc((50, 46), (24.2, 22.6), 14.0, level=3.0, outside=0.05, blur=2.0)
    rng = np.random.default_rng(1)
    found = [find_disc(rng.poisson(100 * pattern).astype(float)) for _ in range(60)]
    for of, sigma in (
        (lambda f: f.center[0], "center_sigma"), (lambda f: f.radius, "radius_sigma"),
    ):  # fmt: skip
        spread = np.std([of(f) for f in found])
        assert 0.4 < spread / np.mean([getattr(f, sigma) for f in found]) < 2


def test_bad_pixels_a_beam_stop_and_a_distortion():
    pattern = disc((60, 56), (31.0, 27.5), 15.0, ellipse=(0.03, -0.02))
    pattern[10, 10], pattern[31:33, 12:15] = 1e4, 0.0
    mask = np.ones(pattern.shape, bool)
    mask[28:34, 28:] = False  # the stop comes in from the side and hides part of the edge
    pattern[~mask] = np.nan
    found = find_disc(pattern, mask)
    np.testing.assert_allclose(found.center, (31.0, 27.5), atol=0.1)
    np.testing.assert_allclose(found.ellipse, (0.03, -0.02), atol=4e-3)
    assert found.radius == pytest.approx(15.0, abs=0.1)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [(np.zeros((20, 24)), "without electrons"),
     (np.full((20, 24), np.inf), "not numbers"),
     (disc((40, 44), (1.0, 43.0), 25.0), "must end inside the detector")],
)  # fmt: skip
def test_no_disc_is_said(pattern, message):
    with pytest.raises(InputError, match=message):
        find_disc(pattern)


def smooth_image(seed=0, finest=0.28):
    """A random periodic image on the raster, band-limited to `finest` of a turn a pixel."""
    rng = np.random.default_rng(seed)
    q = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in SCAN), indexing="ij"))
    image = np.fft.ifft2(np.fft.fft2(rng.normal(size=SCAN)) * np.exp(-((q / finest) ** 2))).real
    return image / image.std()


def gradient(image):
    """(y, x) derivative along the raster's axes, per Å."""
    q = np.meshgrid(*(np.fft.fftfreq(n, d) for n, d in zip(SCAN, STEP, strict=True)), indexing="ij")
    spectrum = np.fft.fft2(image)
    return np.stack([np.fft.ifft2(2j * np.pi * a * spectrum).real for a in q], -1)


def to_detector(rotation, transpose):
    """The matrix from steps along the raster's axes to (y, x) of the detector."""
    cos, sin = np.cos(rotation), np.sin(rotation)
    turn = np.array([[cos, sin], [-sin, cos]])
    return turn[:, ::-1] if transpose else turn


def test_the_matrix_of_these_tests_is_that_of_the_raster():
    index = np.stack(np.meshgrid(*map(np.arange, SCAN), indexing="ij"), -1).reshape(-1, 2)
    for rotation, transpose in ((0.3, False), (2.0, True)):
        expected = (index * STEP) @ to_detector(rotation, transpose).T
        np.testing.assert_allclose(raster(SCAN, STEP, rotation, transpose), expected, atol=1e-9)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rotation", [0.0, 0.5, np.pi / 2, 2.1, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_curl_tells_the_orientation(rotation, transpose, noise):
    field = gradient(smooth_image()) @ to_detector(rotation, transpose).T
    field += noise * field.std() * np.random.default_rng(1).normal(size=field.shape)
    found = find_orientation(field + 3.0, STEP)
    assert found.transpose == transpose
    apart = (found.rotation - rotation + np.pi / 2) % np.pi - np.pi / 2
    assert abs(apart) < max(4 * found.sigma, 0.02)
    assert found.sigma < 0.06 and found.curl < 0.5 * found.other


def test_an_orientation_needs_a_field():
    with pytest.raises(InputError, match="4 × 4"):
        find_orientation(np.zeros((3, 9, 2)), STEP)


@pytest.mark.parametrize("kind", ["dense", "events"])
def test_signals_are_sums_of_electrons(tmp_path, kind):
    rng = np.random.default_rng(0)
    center, radius = (9.3, 7.8), 5.2
    cube = rng.poisson(disc((19, 17), center, radius, 4.0), (3, 5, 19, 17)).astype(np.uint8)
    if kind == "dense":
        np.save(tmp_path / "scan.npy", cube)
        source = read(tmp_path / "scan.npy")
    else:
        from smpr3d_jax.data.counts import events_from_frames, Frames

        events = events_from_frames(Frames(jnp.asarray(cube.reshape(15, 19, 17))))
        write_stempy(tmp_path / "scan.h5", events, (3, 5))
        source = read(tmp_path / "scan.h5")
    mask = np.ones((19, 17), bool)
    mask[9, 6] = False
    found = gather_signals(source, center, radius, mask, cells=20)
    y, x = np.mgrid[:19, :17]
    y, x = y - center[0], x - center[1]
    away = np.hypot(y, x)
    cube = cube * mask
    np.testing.assert_allclose(found.electrons, cube.sum((2, 3)))
    np.testing.assert_allclose(found.dark, (cube * (away > radius + 1)).sum((2, 3)))
    near = cube * (away <= found.reach)
    com = np.stack([(near * a).sum((2, 3)) for a in (y, x)], -1) / near.sum((2, 3))[..., None]
    np.testing.assert_allclose(found.com, com, atol=1e-5)
    assert found.images.shape == (3, 5, len(found.cells)) and found.cell_pixels.max() == 4
    inside = (cube * (away <= radius + 0.5)).sum((2, 3))
    assert (found.images.sum(-1) <= inside).all() and found.images.sum() > 0.7 * inside.sum()
    # A cell's middle is the mean of its pixels: its number times the side, to within half a side.
    assert np.abs(found.cells - 2 * found.names).max() <= 1


def test_signals_need_a_disc_on_the_detector(tmp_path):
    np.save(tmp_path / "scan.npy", some_cube())
    with pytest.raises(InputError, match="cannot be used"):
        gather_signals(read(tmp_path / "scan.npy"), (2.0, 3.0), 8.0)


def weak_signals(lens, transpose, phase, loss=None, noise=0.0, cells=9, depth=0.0, seed=0):
    """Bright-field images of a weak object, pixel by pixel from the waves that interfere.

    I(k) = |A(k)|² + 2 Re sum_Q A*(k) A(k - Q) o(Q) exp(2 pi i Q r), a loop over frequencies Q.
    """
    lam = wavelength(ENERGY)
    cutoff = ANGLE * 1e-3 / lam
    side = 2 * cutoff / (cells - 1)
    grid = side * (np.arange(cells) - cells // 2)
    k = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    k = k[np.hypot(*k.T) <= cutoff - side / 2]
    images = []
    for scan in range(len(lens.shift)):
        own = {n: v[scan : scan + 1] for n, v in lens.aberrations.items()}
        own["C10"] = own["C10"] + depth

        def wave(k, own=own):
            y, x = (jnp.asarray(a) for a in np.moveaxis(k, -1, 0))
            chi = np.asarray(aberration_phase(own, y, x, ENERGY))[0]
            open_ = np.clip((cutoff - np.hypot(*np.moveaxis(k, -1, 0))) / side + 0.5, 0, 1)
            return open_ * np.exp(-1j * chi)

        matrix = to_detector(float(lens.rotation), transpose)
        axes = (np.fft.fftfreq(n, d) for n, d in zip(SCAN, STEP, strict=True))
        q = np.stack(np.meshgrid(*axes, indexing="ij"), -1) @ matrix.T
        o = np.fft.fft2(1j * phase - (0 if loss is None else loss)) / phase.size
        ramp = np.exp(2j * np.pi * q @ np.asarray(lens.shift[scan]))
        stack = []
        for one in k:
            spectrum = np.conj(wave(one)) * wave(one - q) * o * ramp
            stack.append(1 + 2 * np.fft.ifft2(spectrum * phase.size).real)
        images.append(np.stack(stack, -1))
    rng = np.random.default_rng(seed)
    found = []
    for image in images:
        image = 400 * np.clip(image + noise * rng.normal(size=image.shape), 0.01, None)
        place = k / side
        none = np.zeros(SCAN)
        found.append(
            Signals(none, none, np.zeros((*SCAN, 2)), image, place, np.ones(len(k)), place, 1.0)
        )
    return found, side * lam * 1e3


def a_lens(rotation, defoci, **others):
    count = len(defoci)
    each = {"C10": -jnp.asarray(defoci, jnp.float32)}
    each |= {name: jnp.full(count, value, jnp.float32) for name, value in others.items()}
    shift = jnp.asarray(np.linspace([-0.3, 0.2], [0.3, -0.2], count), jnp.float32)
    return Lens(jnp.float32(rotation), each, shift if count > 1 else 0 * shift)


@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_explained_is_a_projection(transpose):
    true = a_lens(0.4, [90.0, -60.0], C12a=15.0)
    signals, pixel = weak_signals(true, transpose, 0.02 * smooth_image(), 0.01 * smooth_image(1))
    data = overlaps(signals, STEP, ENERGY, ANGLE, pixel, 200)
    data = data.transposed() if transpose else data
    assert float(explained(true, data)) > 0.98
    wrong = a_lens(0.4, [0.0, -60.0], C12a=15.0)
    assert float(explained(wrong, data)) < 0.8
    # The opposite lens explains as much: the sign is not in these images.
    opposite = Lens(
        true.rotation + np.pi, {n: -v for n, v in true.aberrations.items()}, -true.shift
    )
    assert float(explained(opposite, data)) == pytest.approx(float(explained(true, data)), rel=1e-4)
    phase, amplitude = (np.asarray(part)[:, 0] for part in contrast(true, data))
    np.testing.assert_allclose(np.abs(amplitude).mean() / np.abs(phase).mean(), 0.5, rtol=0.1)


@pytest.mark.parametrize(
    ("rotation", "transpose", "defoci"),
    [(0.4, False, [110.0]), (2.2, True, [110.0, -50.0]), (3.5, False, [5.0, 120.0])],
)  # fmt: skip
def test_the_lens_is_found_in_noise(rotation, transpose, defoci):
    true = a_lens(rotation, defoci, C12a=12.0, C12b=-8.0)
    phase = 0.04 * smooth_image()
    signals, pixel = weak_signals(true, transpose, phase, 0.3 * (phase - phase.min()), noise=0.05)
    data = overlaps(signals, STEP, ENERGY, ANGLE, pixel, 200)
    found = fit_lens(data, min(n * d for n, d in zip(SCAN, STEP, strict=True)))
    assert found.transpose == transpose and found.decided == "phase and lost electrons"
    turned = (float(found.lens.rotation) - rotation + np.pi) % (2 * np.pi) - np.pi
    assert abs(turned) < np.deg2rad(0.5)
    assert found.sign > 0.3 and found.other < 0.95
    for name, value in true.aberrations.items():
        got, error = (np.asarray(of.aberrations[name]) for of in (found.lens, found.sigma))
        if len(defoci) > 1 and name == "C10":  # layers and scans may move together
            np.testing.assert_allclose(got.mean(), value.mean(), atol=8)
            got, value = got - got.mean(), value - value.mean()
        np.testing.assert_allclose(got, value, atol=1.5)
        assert (error > 0.003).all() and (error < 1.5).all()
    np.testing.assert_allclose(found.lens.shift, true.shift, atol=0.05)


def test_nominal_defoci_and_a_known_rotation_decide_the_sign():
    true = a_lens(0.4, [80.0])
    signals, pixel = weak_signals(true, False, 0.04 * smooth_image(), noise=0.02)
    data = overlaps(signals, STEP, ENERGY, ANGLE, pixel, 200)
    for sign in (1, -1):
        found = fit_lens(data, 20.0, nominal=[sign * 50.0], transpose=False)
        assert found.decided == "the nominal defocus"
        assert float(found.lens.aberrations["C10"][0]) == pytest.approx(-sign * 80, abs=1)
    found = fit_lens(data, 20.0, rotation=0.4 + np.pi, transpose=False)
    assert found.decided == "the rotation given"
    assert float(found.lens.aberrations["C10"][0]) == pytest.approx(80, abs=1)
    assert float(found.sigma.rotation) == 0


@pytest.mark.slow
def test_the_standard_errors_of_a_lens_are_those_of_many_draws():
    true = a_lens(0.4, [60.0])
    phase = 0.03 * smooth_image()
    got, errors = [], []
    for seed in range(8):
        signals, pixel = weak_signals(true, False, phase, noise=0.1, seed=seed)
        data = overlaps(signals, STEP, ENERGY, ANGLE, pixel, 200)
        found = fit_lens(data, 20.0, rotation=0.4, transpose=False)
        got.append(float(found.lens.aberrations["C10"][0]))
        errors.append(float(found.sigma.aberrations["C10"][0]))
    assert 0.5 < np.std(got) / np.mean(errors) < 2


@pytest.mark.slow
def test_aberrations_of_higher_order():
    true = a_lens(0.4, [150.0], C12a=12.0, C21b=3000.0, C30=1e5)
    signals, pixel = weak_signals(true, False, 0.03 * smooth_image(), noise=0.02, cells=13)
    data = overlaps(signals, STEP, ENERGY, ANGLE, pixel, 200)
    found = fit_lens(data, 20.0, order=3, transpose=False, nominal=[100.0])
    for name, scale in (("C21b", 300.0), ("C30", 3e4), ("C23a", 300.0), ("C12a", 3.0)):
        value = float(true.aberrations.get(name, jnp.zeros(1))[0])
        assert float(found.lens.aberrations[name][0]) == pytest.approx(value, abs=scale), name


def test_lenses_that_cannot_be_fitted():
    signals, pixel = weak_signals(a_lens(0.0, [50.0]), False, 0.02 * smooth_image())
    with pytest.raises(InputError, match="scan a larger field"):
        overlaps(signals, (0.02, 0.02), ENERGY, ANGLE, pixel)
    with pytest.raises(InputError, match="order 1 to 5"):
        fit_lens(overlaps(signals, STEP, ENERGY, ANGLE, pixel), 20.0, order=6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("rotation", "defocus"), [(0.3, 800.0), (2.5, 800.0), (2.5, -700.0)])
def test_displacements_in_closed_form(rotation, transpose, defocus):
    """d = -R^T (C1 + A1) theta, written down and not measured."""
    c12a, c12b = 60.0, -40.0
    theta = np.random.default_rng(0).uniform(-20, 20, (40, 2))
    lens = np.array([[-defocus - c12a, c12b], [c12b, -defocus + c12a]]) * 1e-3
    moved = -(theta @ lens.T) @ to_detector(rotation, transpose)
    moved[3] += 5.0  # one that went astray
    used = np.arange(40) != 3
    found = fit_shifts(Shifts(theta, moved, used))
    assert found.transpose == transpose and found.residual < 1e-9
    assert found.rotation == pytest.approx(rotation, abs=1e-9)
    np.testing.assert_allclose(
        (found.defocus, found.C12a, found.C12b), (defocus, c12a, c12b), rtol=1e-9
    )
    with pytest.raises(InputError, match="too few"):
        fit_shifts(Shifts(theta, moved, np.arange(40) < 4))


def test_displacements_are_measured():
    """Images that are displaced as geometry says, with noise, are aligned to a part of a step."""
    rng = np.random.default_rng(0)
    grid = np.arange(-4, 5.0)
    cells = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    linear = np.array([[0.35, 0.12], [-0.1, 0.3]])
    q = np.meshgrid(*(np.fft.fftfreq(n, d) for n, d in zip(SCAN, STEP, strict=True)), indexing="ij")
    spectrum = np.fft.fft2(smooth_image(finest=0.15))
    moved = cells @ linear.T
    images = [
        np.fft.ifft2(spectrum * np.exp(-2j * np.pi * (q[0] * y + q[1] * x))).real for y, x in moved
    ]
    images = 1 + 0.1 * np.stack(images, -1) + 0.05 * rng.normal(size=(*SCAN, len(cells)))
    none = np.zeros(SCAN)
    signals = Signals(none, none, np.zeros((*SCAN, 2)), images, cells, np.ones(81), cells, 1.0)
    found = measure_shifts(signals, STEP, 1.0)
    assert found.used.mean() > 0.9
    assert np.sqrt(np.mean((found.moved - moved)[found.used] ** 2)) < 0.15


def lattice_image(shape, step, spacing, angles, noise, seed=0):
    y, x = np.meshgrid(*(np.arange(n) * d for n, d in zip(shape, step, strict=True)), indexing="ij")
    waves = [np.cos(2 * np.pi * (np.sin(a) * y + np.cos(a) * x) / spacing + a) for a in angles]
    return 5 + np.sum(waves, 0) + noise * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("noise", [0.0, 2.0])
@pytest.mark.parametrize("step", [(0.41, 0.41), (0.42, 0.37)])
def test_the_step_from_a_lattice(step, noise):
    """Hexagonal, turned, with the spacing of another plane beside it."""
    angles = np.deg2rad([10, 70, 130])
    image = lattice_image((70, 90), step, 2.13, angles, noise)
    image += lattice_image((70, 90), step, 2.13 / np.sqrt(3), angles + np.pi / 6, 0)
    found = step_from_lattice(image, 2.13, 0.4)
    assert found.separate and len(found.peaks) == 3
    np.testing.assert_allclose(found.step, step, rtol=1e-2 if noise else 1e-3)
    assert all(abs(s - t) < 4 * e for s, t, e in zip(found.step, step, found.sigma, strict=True))


def test_fringes_of_one_direction_give_one_step():
    found = step_from_lattice(lattice_image((64, 80), (0.4, 0.4), 2.5, [0.3], 0.5), 2.5, 0.42)
    assert not found.separate and found.step[0] == found.step[1]
    assert found.step[0] == pytest.approx(0.4, rel=5e-3)


@pytest.mark.parametrize(
    ("spacing", "nominal", "message"),
    [(0.5, 0.4, "more than two steps"), (1.3, 0.4, "stands out of the noise")],
)
def test_a_lattice_that_is_not_seen(spacing, nominal, message):
    image = lattice_image((64, 80), (0.4, 0.4), 2.5, [0.3], 0.5)
    with pytest.raises(InputError, match=message):
        step_from_lattice(image, spacing, nominal)
    with pytest.raises(InputError, match="8 × 8"):
        step_from_lattice(image[:5], 2.5, 0.4)
