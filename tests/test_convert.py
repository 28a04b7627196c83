"""Between any two formats, whatever is cropped and binned on the way, every electron arrives."""

import itertools
import os

import numpy as np
import pytest

from smpr3d_jax.app import convert as conversion
from smpr3d_jax.app.convert import Changes, convert, TARGETS
from smpr3d_jax.data.counts import Frames, InputError
from smpr3d_jax.data.events import event_rows
from smpr3d_jax.data.readers import read, write_raw_csr, write_stempy

from .scan_files import flat, save_plain, some_cube
from .test_events import shuffled
from .tiny import smpr3d


SCAN, FRAME = (4, 6), (6, 10)
FACTS = {
    "scan_step_A": (0.5, 0.25),
    "detector_pixel_mrad": (1.5, 1.5),
    "center": (3.0, 5.0),
    "rotation_deg": 12.0,
    "transpose": True,
    "energy_ev": 80e3,
    "semiangle_mrad": 21.0,
    "exposure_s": 0.001,
}


def cube_of(mean=1.0, seed=0):
    return np.random.default_rng(seed).poisson(mean, (*SCAN, *FRAME)).astype(np.uint8)


def counts_of(source):
    """All counts in integers."""
    counts = source.host()
    values = counts.values if isinstance(counts, Frames) else counts.dense(np.int64)
    return np.asarray(values).reshape(*source.scan_shape, *source.frame_shape)


def first_file(folder, name, cube):
    """A file of one format with everything that is known, by way of raw_csr."""
    write_raw_csr(folder / "first.toml", shuffled(flat(cube)), cube.shape[:2], FACTS)
    path = folder / f"first{TARGETS[name].ending}"
    if name != "raw_csr":
        convert(read(folder / "first.toml"), path, name)
    return read(path)


@pytest.mark.parametrize("pair", list(itertools.product(TARGETS, TARGETS)), ids=" to ".join)
def test_round_trips(tmp_path, pair, monkeypatch):
    """In parts that are smaller than a row of the scan."""
    monkeypatch.setattr(conversion, "PART_BYTES", 5 * 60 * 8)
    cube, (first, second) = cube_of(), pair
    source = first_file(tmp_path, first, cube)
    path, done = tmp_path / f"second{TARGETS[second].ending}", []
    made = convert(source, path, second, progress=done.append)
    again = read(path)
    assert (again.scan_shape, again.frame_shape) == (SCAN, FRAME)
    assert again.kind == TARGETS[second].kind
    np.testing.assert_array_equal(counts_of(again), cube)
    assert done == sorted(done) and done[-1] == 1 and len(done) >= 4
    held = {f: FACTS[f] for f in TARGETS[second].facts if f in source.facts}
    assert again.facts == made.facts == held
    lost = [note for note in made.notes if "has no place for" in note]
    assert len(lost) == (1 if set(source.facts) - set(held) else 0)


def test_sums_and_crops(tmp_path):
    """The same whether on the way or by hand, from frames and from events, into both."""
    cube = cube_of()
    cube[0, 0, 2, 3] = 255
    changes = Changes((0, 4, 1, 5), (4, 6), (3, 4), 2, 2)
    expected = cube[:, 1:5, 1:5, 1:7].astype(int)
    expected = expected.reshape(2, 2, 2, 2, 2, 2, 3, 2).sum((1, 3, 5, 7))
    for first, second in itertools.product(("raw_csr", "npy"), ("raw_csr", "stempy", "emd", "npy")):
        folder = tmp_path / f"{first} {second}"
        folder.mkdir()
        source = first_file(folder, first, cube)
        if expected.max() > 255 and second == "stempy":
            with pytest.raises(InputError, match="raw_csr, which keeps any number"):
                convert(source, folder / "changed", second, changes)
            continue
        made = convert(source, folder / "changed", second, changes)
        again = read(folder / "changed")
        np.testing.assert_array_equal(counts_of(again), expected)
        if source.facts and second != "npy":
            assert again.facts == made.facts
            # The pixel (3, 5) is at (2, 4) of the window, in the first half of a pair.
            assert made.facts["center"] == (0.75, 1.75)
            assert made.facts["scan_step_A"] == (1.0, 0.5)
            assert made.facts["detector_pixel_mrad"] == (3.0, 3.0)
            assert made.facts["semiangle_mrad"] == 21


def test_types_hold_the_sums(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 2, 2, 2), 65535, np.uint16))
    source = read(tmp_path / "a.npy")
    convert(source, tmp_path / "b.npy", changes=Changes(bin=2))
    assert np.load(tmp_path / "b.npy").dtype == np.uint32
    convert(source, tmp_path / "c.toml")
    convert(read(tmp_path / "c.toml"), tmp_path / "d.npy", changes=Changes(bin=2, scan_bin=2))
    assert np.load(tmp_path / "d.npy").item() == 16 * 65535
    np.save(tmp_path / "e.npy", np.full((2, 2, 2, 2), True))
    convert(read(tmp_path / "e.npy"), tmp_path / "f.npy", changes=Changes(bin=2))
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), np.full((2, 2, 1, 1), 4))


def test_fractions_stay_dense(tmp_path):
    cube = some_cube(dtype=np.float64) + 0.1
    np.save(tmp_path / "a.npy", cube)
    source = read(tmp_path / "a.npy")
    convert(source, tmp_path / "b.emd")
    np.testing.assert_array_equal(counts_of(read(tmp_path / "b.emd")), cube)
    for name in ("c.toml", "c.h5"):
        with pytest.raises(InputError, match=r"a\.npy.*whole, non-negative counts"):
            convert(source, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.emd"]


def test_nothing_is_replaced_by_accident(tmp_path):
    save_plain(tmp_path / "a.h5", some_cube())
    source = read(tmp_path / "a.h5")
    (tmp_path / "b.npy").write_text("precious")
    with pytest.raises(InputError, match=r"b\.npy exists.*--force"):
        convert(source, tmp_path / "b.npy")
    assert (tmp_path / "b.npy").read_text() == "precious"
    convert(source, tmp_path / "b.npy", force=True)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), some_cube())
    for _ in range(2):
        convert(source, tmp_path / "b.zarr", force=True)
    np.testing.assert_array_equal(counts_of(read(tmp_path / "b.zarr")), some_cube())
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "b.npy", "b.zarr"]


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("a.h5", {"force": True}, "is what is read"),
        ("b.tiff", {}, r"the ending says no format; known are \.emd \(emd\)"),
        ("b", {"to": "hdf"}, "'hdf' is no format to write; known are emd, stempy"),
        ("no/b.npy", {}, "there is no folder"),
        ("folder", {"to": "npy", "force": True}, "is a folder"),
        ("b.npy", {"changes": Changes(bin=4)}, "frames of 4 × 6 cannot be binned by 4.*4 × 4"),
        ("b.npy", {"changes": Changes(scan_bin=2)}, "scan of 3 × 5 cannot be binned by 2.*2 × 4"),
        ("b.npy", {"changes": Changes(crop=(9, 3))}, r"a\.h5.*window of 9 pixels"),
        ("b.npy", {"changes": Changes((0, 4, 0, 5))}, "rows 0 to 4 .* not in the scan of 3 × 5"),
    ],
)
def test_what_cannot_be(tmp_path, name, given, message):
    save_plain(tmp_path / "a.h5", some_cube())
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        convert(read(tmp_path / "a.h5"), tmp_path / name, **given)
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "folder"]


def test_the_command(tmp_path):
    cube = cube_of()
    square = np.zeros((*SCAN, 8, 8), np.uint8)
    square[:, :, 1:7] = cube[..., 1:9]
    rows = event_rows(Frames(flat(square)))
    write_stempy(tmp_path / "a.h5", rows, SCAN, {"energy_ev": 80e3})
    answer = smpr3d(
        "convert", tmp_path / "a.h5", tmp_path / "b.emd", "--crop", 6, 8, "--bin", 2,
        "--scan-bin", 2, "--drop-flyback", "--scan-window", 0, 4, 0, 4,
    )  # fmt: skip
    assert "b.emd: emd, 2 × 2 × 3 × 4" in answer.stderr
    expected = cube[:, :4, :, 1:9].reshape(2, 2, 2, 2, 3, 2, 4, 2).sum((1, 3, 5, 7))
    again = read(tmp_path / "b.emd")
    np.testing.assert_array_equal(counts_of(again), expected)
    assert again.facts == {"energy_ev": 80e3}
    answer = smpr3d("convert", tmp_path / "a.h5", tmp_path / "b.emd")
    assert answer.exit_code == 2 and "b.emd exists" in answer.stderr
