"""Reconstructions of other packages: what is read, what is written, what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import smpr3d_jax as sj
from smpr3d_jax import interchange
from smpr3d_jax.data.counts import InputError
from smpr3d_jax.physics.fourier import fft
from smpr3d_jax.physics.optics import interaction_parameter

from .peer_layouts import like_phaser, like_ptyrad, like_py4dstem, scene
from .scan_files import opened


SINGLE = {"slices": 1, "probes": 1}
SQUARE = {"window": (12, 12)}
EVEN = np.full(3, 12.0)
ARRAYS = "transmission", "probes", "positions", "weights", "tilts", "thicknesses"


def assert_same(found, wanted, tolerance=2e-6, but=()):
    """The same waves at the same places."""
    for name in ARRAYS:
        if name not in but:
            a, b = getattr(found, name), getattr(wanted, name)
            assert a.shape == b.shape, name
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), err_msg=name)
    np.testing.assert_allclose(found.origin, wanted.origin, atol=1e-5)
    np.testing.assert_allclose(found.sampling, wanted.sampling, rtol=1e-6)
    assert found.energy == pytest.approx(wanted.energy, rel=1e-6)


def test_patterns_of_vacuum():
    one = scene(objects=2)
    empty = dataclasses.replace(one, transmission=np.ones_like(one.transmission))
    wanted = np.sum(np.abs(np.fft.fft2(one.probes, norm="ortho")) ** 2, axis=0)
    np.testing.assert_allclose(interchange.patterns(empty), np.stack([wanted] * 6), rtol=1e-9)


@pytest.mark.parametrize("shape", [(14, 10), (13, 9)])
def test_patterns_agree_with_our_multislice(x64, shape):
    """A window as large as the object, so that both are periodic in it."""
    sampling, depths, tilt = (0.3, 0.2), (0.0, 12.0, 32.0), (4.0, -7.0)
    rng = np.random.default_rng(1)
    potential = rng.normal(0, 50, (3, *shape))
    waves = rng.normal(size=(2, *shape)) + 1j * rng.normal(size=(2, *shape))
    plates = np.exp(1j * interaction_parameter(80e3) * potential)[None]
    middle = np.array(shape) // 2
    one = interchange.Exchange(
        80e3, sampling, plates, np.array([12.0, 20.0, 0.0]),
        (-middle[0] * 0.3, -middle[1] * 0.2), waves, np.zeros((1, 2)), np.ones(1),
        np.array([tilt]),
    )  # fmt: skip
    slices = sj.Slices(jnp.asarray(potential), depths, sj.Grid(shape, sampling))
    exit_waves = sj.multislice(jnp.asarray(waves), slices, 80e3, 0.0, 32.0, tilt)
    wanted = np.sum(np.abs(np.asarray(fft(exit_waves))) ** 2, axis=0)
    np.testing.assert_allclose(interchange.patterns(one)[0], wanted, rtol=1e-8)


def test_patterns_follow_the_object_and_the_order_of_frames():
    one = scene(objects=2, tilts=6)
    frames = interchange.patterns(one)
    y, x = (3, -2)
    moved = np.roll(one.transmission, (y, x), axis=(2, 3))
    back = (one.origin[0] - y * one.sampling[0], one.origin[1] - x * one.sampling[1])
    # The windows of a smaller scan stay on what was not rolled around.
    near = dataclasses.replace(one, transmission=np.pad(moved, [(0, 0)] * 2 + [(5, 5)] * 2))
    corner = tuple(b - 5 * d for b, d in zip(back, one.sampling, strict=True))
    middle = interchange.patterns(dataclasses.replace(near, origin=corner), np.array([4]))
    wide = dataclasses.replace(
        one,
        transmission=np.pad(one.transmission, [(0, 0)] * 2 + [(8, 8)] * 2),
        origin=tuple(o - 8 * d for o, d in zip(one.origin, one.sampling, strict=True)),
    )
    np.testing.assert_allclose(interchange.patterns(wide, slice(4, 5)), frames[4:5], rtol=1e-9)
    assert middle.shape == (1, *one.probes.shape[1:])
    order = np.array([5, 0, 2])
    np.testing.assert_array_equal(interchange.patterns(one, order), frames[order])


def test_a_tilt_is_slices_that_lie_sideways():
    """exp(-2 pi i dz k.tan(tilt)) = the next slices moved by -dz tan(tilt)."""
    shape, sampling = (24, 20), (0.2, 0.25)
    ky, kx = (np.fft.fftfreq(n, d) for n, d in zip(shape, sampling, strict=True))
    low = np.exp(-((ky[:, None] / 0.4) ** 2) - (kx / 0.4) ** 2)
    rng = np.random.default_rng(2)
    smooth = lambda: np.fft.ifft2(np.fft.fft2(rng.normal(size=shape)) * low).real
    tilt, gap = np.array([[30.0, -20.0]]), 10.0
    walk = gap * np.tan(tilt[0] * 1e-3)
    second = np.fft.fft2(smooth())
    ramp = np.exp(2j * np.pi * (ky[:, None] * walk[0] + kx * walk[1]))
    first = np.exp(1j * smooth())
    plates = np.stack([first, np.exp(1j * np.fft.ifft2(second).real)])[None]
    shifted = np.stack([first, np.exp(1j * np.fft.ifft2(second * ramp).real)])[None]
    wave = np.fft.fftshift(np.fft.ifft2(low + 0j))[None]
    middle = -(shape[0] // 2) * sampling[0], -(shape[1] // 2) * sampling[1]
    make = lambda plates, tilt: interchange.Exchange(
        80e3, sampling, plates, np.array([gap, 0.0]), middle, wave, np.zeros((1, 2)), np.ones(1),
        tilt,
    )  # fmt: skip
    tilted = interchange.patterns(make(plates, tilt))
    np.testing.assert_allclose(tilted, interchange.patterns(make(shifted, 0 * tilt)), atol=1e-9)
    assert not np.allclose(tilted, interchange.patterns(make(plates, -tilt)), atol=1e-5)


LAYOUTS = {
    "py4dstem": (like_py4dstem, {}),
    "phaser": (like_phaser, {"tilts": 6}),
    "ptyrad": (like_ptyrad, SQUARE | {"objects": 2, "tilts": 6, "thicknesses": EVEN}),
}


@pytest.mark.parametrize("format", LAYOUTS)
def test_reading(tmp_path, format):
    save, how = LAYOUTS[format]
    one = scene(**how)
    save(tmp_path / "a.h5", one)
    found = interchange.read(tmp_path / "a.h5")
    last = format == "py4dstem"
    assert_same(found, one, but=("thicknesses",) if last else ())
    np.testing.assert_allclose(found.thicknesses[:-1], one.thicknesses[:-1])
    assert found.thicknesses[-1] == (20.0 if last else one.thicknesses[-1])
    (losses,) = found.losses.values()
    np.testing.assert_array_equal(losses, [3.0, 2.0, 1.5])
    if format != "phaser":
        assert found.aberrations == pytest.approx(one.aberrations)
        assert found.semiangle == 25
    assert found.scan_shape == (None if last else one.scan_shape)
    np.testing.assert_allclose(
        interchange.patterns(found), interchange.patterns(one), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("slices, probes", [(1, 1), (1, 2), (2, 1)])
def test_reading_fewer(tmp_path, format, slices, probes):
    save, how = LAYOUTS[format]
    thin = EVEN if format == "ptyrad" else np.array([5.0, 5.0])
    one = scene(**how | {"slices": slices, "probes": probes, "thicknesses": thin[:slices]})
    save(tmp_path / "a.h5", one)
    found = interchange.read(tmp_path / "a.h5")
    known = format == "ptyrad" or slices > 1
    assert found.thicknesses[-1] == (one.thicknesses[-1] if known else 0)
    assert_same(found, one, but=("thicknesses",))


def test_potentials_of_py4dstem(tmp_path):
    one = scene()
    phases = dataclasses.replace(one, transmission=one.transmission / np.abs(one.transmission))
    like_py4dstem(tmp_path / "a.h5", phases, kind="potential")
    assert_same(interchange.read(tmp_path / "a.h5"), phases, but=("thicknesses",))


def test_what_py4dstem_saves_beside(tmp_path):
    like_py4dstem(tmp_path / "a.h5", scene(), amplitudes_shape=np.array([5, 7]))
    found = interchange.read(tmp_path / "a.h5")
    assert found.unit == "counts"
    assert found.facts["rotation_deg"] == pytest.approx(np.degrees(0.1))
    assert found.facts["transpose"] is True
    assert any("(10, 14) pixels with patterns of (5, 7)" in note for note in found.notes)


def test_windows_beside_the_object_of_py4dstem(tmp_path):
    """py4DSTEM takes the object for periodic."""
    one = scene()
    like_py4dstem(tmp_path / "whole.h5", one)
    pixels = (one.positions - one.origin) / one.sampling
    like_py4dstem(tmp_path / "a.h5", one, positions_px=pixels + [-5, 9])
    found = interchange.read(tmp_path / "a.h5")
    assert "continued periodically" in found.notes[0]
    rolled = dataclasses.replace(one, transmission=np.roll(one.transmission, (5, -9), (2, 3)))
    like_py4dstem(tmp_path / "b.h5", rolled)
    np.testing.assert_allclose(
        interchange.patterns(found),
        interchange.patterns(interchange.read(tmp_path / "b.h5")),
        rtol=1e-3, atol=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("window", [(10, 14), (9, 14), (11, 13)])
def test_older_states_of_phaser_and_odd_windows(tmp_path, window):
    one = scene(window=window)
    like_phaser(tmp_path / "a.h5", one, version="0.1")
    found = interchange.read(tmp_path / "a.h5")
    assert_same(found, one)
    assert [*found.losses] == ["total_loss"]
    assert "band_limit" in found.notes[0]


def test_a_propagator_of_ptyrad_that_was_half_a_pixel_off(tmp_path):
    one = scene(**SQUARE, thicknesses=EVEN)
    like_ptyrad(tmp_path / "new.h5", one)
    like_ptyrad(tmp_path / "old.h5", one, off=0.5)
    new, old = (interchange.read(tmp_path / f"{name}.h5") for name in ("new", "old"))
    assert_same(new, one)
    slope = np.tan(old.tilts * 1e-3) - np.tan(new.tilts * 1e-3)
    np.testing.assert_allclose(slope, one.wavelength / (2 * 12 * 0.25), rtol=1e-6)
    assert "half a pixel off" in old.notes[0]


def test_a_ptyrad_model_without_parameters(tmp_path):
    one = scene(**SQUARE, thicknesses=EVEN)
    given = ["probe_kv", "probe_conv_angle", "probe_illum_type"]
    given += [f"probe_aberrations/{n}" for n in ("defocus", "A1", "A1phi", "B2", "B2phi")]
    like_ptyrad(tmp_path / "a.h5", one, 0.0, **{f"params/init_params/{n}": None for n in given})
    found = interchange.read(tmp_path / "a.h5")
    assert_same(found, one)
    assert (found.semiangle, dict(found.aberrations)) == (None, {})


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_round_trips(tmp_path, source, target):
    """Through a file of any package into any other and back."""
    save, _ = LAYOUTS[source]
    one = scene(**SQUARE, thicknesses=EVEN)
    save(tmp_path / "a.h5", one)
    first = interchange.read(tmp_path / "a.h5")
    interchange.write(tmp_path / "b.h5", first, target)
    second = interchange.read(tmp_path / "b.h5")
    assert second.facts != first.facts or source == target
    assert_same(second, first)
    if target != "phaser":
        assert second.aberrations == pytest.approx(dict(first.aberrations))
    np.testing.assert_array_equal([*second.losses.values()], [*first.losses.values()])


@pytest.mark.parametrize("format", ["py4dstem", "phaser"])
def test_windows_beside_the_object_are_given_vacuum(tmp_path, format):
    one = scene()
    inner = dataclasses.replace(
        one,
        transmission=one.transmission[:, :, 3:-2, 2:-4],
        origin=(one.origin[0] + 3 * 0.3, one.origin[1] + 2 * 0.2),
    )
    interchange.write(tmp_path / "a.h5", inner, format)
    found = interchange.read(tmp_path / "a.h5")
    assert not any("continued" in note for note in found.notes)
    np.testing.assert_allclose(
        interchange.patterns(found), interchange.patterns(inner), rtol=1e-4, atol=1e-3
    )


NO_PLACE = {
    "py4dstem": {"objects": (2, "2 object states"), "tilts": (6, "a tilt for each frame")},
    "phaser": {"objects": (2, "2 object states")},
    "ptyrad": {
        "window": ((10, 14), r"windows of \(10, 14\) pixels"),
        "sampling": ((0.2, 0.3), "one pixel size"),
        "thicknesses": (np.array([12.0, 20.0, 7.0]), "one slice thickness"),
        "band_limit": (0.66, "a band limit"),
    },
}


@pytest.mark.parametrize("format, key", [(f, k) for f, keys in NO_PLACE.items() for k in keys])
def test_what_a_format_has_no_place_for(tmp_path, format, key):
    value, message = NO_PLACE[format][key]
    good = SQUARE | {"thicknesses": EVEN} | ({"tilts": 1} if format != "phaser" else {})
    with pytest.raises(InputError, match=f"a.h5: .*{message}"):
        interchange.write(tmp_path / "a.h5", scene(**good | {key: value}), format)
    assert not [*tmp_path.iterdir()]


NEEDED = {
    "py4dstem": ["my run/_object_emd/data", "metadatabundle/preprocess_metadata/positions_px",
                 "instantiation_metadata/energy", "instantiation_metadata/slice_thicknesses"],
    "phaser": ["probe/data", "object/corner", "object/thicknesses", "scan/data", "wavelength"],
    "ptyrad": ["optimizable_tensors/obja", "optimizable_tensors/probe", "model_attributes/dx",
               "model_attributes/crop_pos", "model_attributes/lambd"],
}  # fmt: skip


def find(file, ending):
    found = []
    file.visit(lambda name: found.append(name) if name.endswith(ending) else None)
    return found[0]


@pytest.mark.parametrize("format, key", [(f, k) for f, keys in NEEDED.items() for k in keys])
@pytest.mark.parametrize("how", ["missing", "empty", "text", "one axis more"])
def test_files_that_are_not_whole(tmp_path, format, key, how):
    save, more = LAYOUTS[format]
    path = tmp_path / "a.h5"
    save(path, scene(**more))
    with opened(path, "a") as file:
        name = find(file, key)
        old = file[name][()]
        del file[name]
        if how == "empty":
            file[name] = np.zeros(0)
        elif how == "text":
            file[name] = "nothing"
        elif how == "one axis more":
            file[name] = np.stack([old, old])[None, None]
    with pytest.raises(InputError, match=f"a.h5.*{key.split('/')[-1]}"):
        interchange.read(path, format)


def test_files_of_other_kinds(tmp_path):
    with pytest.raises(InputError, match="none.h5 does not exist"):
        interchange.read(tmp_path / "none.h5")
    (tmp_path / "a.txt").write_text("hello")
    with opened(tmp_path / "a.h5", "w") as file:
        file["data"] = np.zeros(3)
    for name in ("a.txt", "a.h5"):
        with pytest.raises(InputError, match=f"{name}: is no reconstruction"):
            interchange.read(tmp_path / name)
    with pytest.raises(InputError, match="no format 'quantem'; known are .'phaser'"):
        interchange.read(tmp_path / "a.h5", "quantem")
    like_py4dstem(tmp_path / "b.h5", scene(), python_class="PtychographicTomography")
    with pytest.raises(InputError, match="b.h5: holds 0 ptychographic reconstructions"):
        interchange.read(tmp_path / "b.h5", "py4dstem")
    like_phaser(tmp_path / "c.h5", scene(), version="0.9")
    with pytest.raises(InputError, match="'0.9'; known are"):
        interchange.read(tmp_path / "c.h5")


def test_a_file_that_is_cut_short(tmp_path):
    like_phaser(tmp_path / "a.h5", scene())
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "b.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="b.h5"):
        interchange.read(tmp_path / "b.h5")


WRONG = {
    "tilts": (np.zeros((4, 2)), "but there are 6 frames"),
    "weights": (np.ones(2), "but there are 1 object states"),
    "thicknesses": (np.array([1.0, -2.0, 1.0]), "cannot be"),
    "energy": (80.0, "80 eV"),
    "sampling": ((0.3, 0.0), "pixel"),
    "unit": ("adu", "one of"),
    "aberrations": ({"C99": 1.0}, "'C99' is no aberration"),
    "scan_shape": ((2, 4), "does not have 6 frames"),
    "probes": (np.full((2, 10, 14), np.nan + 0j), "`probes` of an exchange holds"),
    "transmission": (np.ones((1, 0, 20, 20), complex), "`transmission` .* is not empty"),
}


@pytest.mark.parametrize("key", WRONG)
def test_exchanges_that_cannot_be(key):
    value, message = WRONG[key]
    with pytest.raises(InputError, match=message):
        dataclasses.replace(scene(), **{key: value})
