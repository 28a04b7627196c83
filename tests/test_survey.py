"""Bad counts are found before anything is begun with them."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.readers import (
    check_counts,
    check_series,
    describe,
    read,
    write_emd,
    write_stempy,
)
from smpr3d_jax.data.readers.source import Source

from .helpers import shared_data
from .scan_files import flat, FRAME, opened, SCAN, some_cube


@pytest.mark.parametrize("value, what", [(np.nan, "not a number"), (np.inf, "n"), (-1, "negative")])
def test_impossible_counts(tmp_path, value, what):
    cube = some_cube(dtype=np.float32)
    cube[1, 3, 2, 2] = cube[2, 0, 0, 0] = value
    np.save(tmp_path / "scan.npy", cube)
    source = read(tmp_path / "scan.npy")
    source.read(np.arange(8))
    message = rf"scan\.npy.*2 of 15 frames have .*{what}.*frame 8 \(scan position 1, 3\)"
    for reading in (source.read, lambda: check_counts(source)):
        with pytest.raises(InputError, match=message):
            reading()
    assert any("2 of 15 frames" in note for note in describe(source)["notes"])


@pytest.mark.parametrize("kind", ["dense", "events"])
def test_empty_frames(tmp_path, kind):
    cube = some_cube()
    cube[1, 2] = cube[2, 4] = 0
    path = tmp_path / "scan.h5"
    if kind == "dense":
        write_emd(path, cube, 0.5, 1.5)
    else:
        write_stempy(path, events_from_frames(Frames(jnp.asarray(flat(cube)))), SCAN)
    source = read(path)
    with pytest.raises(InputError, match="2 of 15 frames have no counts at all.*frame 7"):
        check_counts(source)
    assert check_counts(source, allow_empty=True) == (
        "2 of 15 frames have no counts at all, the first is frame 7",
    )
    np.save(tmp_path / "dark.npy", 0 * cube)
    with pytest.raises(InputError, match="15 of 15 frames have no counts"):
        check_counts(read(tmp_path / "dark.npy"), allow_empty=True)


def test_empty_frames_at_a_dose_that_explains_them_are_only_told_of(tmp_path):
    cube = np.zeros((*SCAN, 6, 8), np.uint8)
    cube.reshape(-1, 48)[:12, 5] = 2
    np.save(tmp_path / "sparse.npy", cube)
    (note,) = check_counts(read(tmp_path / "sparse.npy"))
    assert "3 of 15 frames have no counts at all" in note


def test_counts_that_are_not_whole(tmp_path):
    np.save(tmp_path / "scan.npy", some_cube() * 0.5)
    notes = check_counts(read(tmp_path / "scan.npy"))
    assert len(notes) == 1 and "not whole numbers" in notes[0]
    np.save(tmp_path / "scan.npy", some_cube() * 2.0)
    assert check_counts(read(tmp_path / "scan.npy")) == ()


@pytest.mark.parametrize("kind", ["dense", "events"])
def test_describe(tmp_path, kind, monkeypatch):
    cube = some_cube()
    cube[..., 0, :] = 0
    path = tmp_path / "scan.h5"
    if kind == "dense":
        write_emd(path, cube, 0.5, 1.5)
    else:
        write_stempy(path, events_from_frames(Frames(jnp.asarray(flat(cube)))), SCAN)
    source = read(path)
    # Four blocks, the last one shorter.
    monkeypatch.setattr(Source, "blocks", lambda s: iter(np.array_split(np.arange(15), 4)))
    said = describe(source)
    total = cube.sum(dtype=float)
    rows, columns = np.indices(FRAME)
    assert said["format"] == ("emd" if kind == "dense" else "stempy")
    assert (said["scan_shape"], said["frame_shape"]) == (SCAN, FRAME)
    np.testing.assert_allclose(said["total_counts"], total)
    np.testing.assert_allclose(said["mean_electrons_per_frame"], total / 15)
    center = ((cube * rows).sum() / total, (cube * columns).sum() / total)
    np.testing.assert_allclose(said["center_of_mass"], center)
    assert (said["largest_count"], said["empty_frames"]) == (cube.max(), 0)
    frames = flat(cube).sum((1, 2))
    assert said["fewest_and_most_in_a_frame"] == (frames.min(), frames.max())


def test_blocks_cover_the_scan_once(tmp_path):
    np.save(tmp_path / "a.npy", some_cube(dtype=np.uint16))
    source = read(tmp_path / "a.npy")
    blocks = list(source.blocks(4 * 48))
    assert [len(b) for b in blocks] == [4, 4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(blocks), np.arange(15))


def test_check_series(tmp_path):
    cubes = {"a": some_cube(), "b": some_cube(1), "c": some_cube()[:2], "d": some_cube()[..., 1:]}
    steps = {"b": (0.6, 1.5), "e": (0.5, 1.6)}
    for name in "abcde":
        write_emd(tmp_path / name, cubes.get(name, some_cube()), *steps.get(name, (0.5, 1.5)))
    a, b, c, d, e = (read(tmp_path / name) for name in "abcde")
    assert check_series([a]) == check_series([a, a]) == ()
    assert "scan_step_A is (0.6, 0.6)" in check_series([a, b])[0]
    with pytest.raises(InputError, match=r"c: scan_shape is \(2, 5\).*a is \(3, 5\)"):
        check_series([a, b, c])
    assert check_series([a, c], same_raster=False) == ()
    with pytest.raises(InputError, match=r"d: frame_shape is \(4, 5\)"):
        check_series([a, d], same_raster=False)
    with pytest.raises(InputError, match=r"e: detector_pixel_mrad is \(1\.6, 1\.6\)"):
        check_series([a, e])
    with pytest.raises(InputError, match="at least one"):
        check_series([])


def test_describe_real_scans():
    said = describe(read(shared_data("nanotubes_series", "scan_0.h5")))
    np.testing.assert_allclose(said["mean_electrons_per_frame"], 15980, rtol=0.01)
    np.testing.assert_allclose(said["center_of_mass"], (25, 25), atol=0.3)
    source = read(shared_data("defocused_probe_300kV", "scan.h5"))
    assert (source.scan_shape, source.frame_shape) == ((64, 64), (128, 128))
    assert source.facts == {
        "scan_step_A": (31.25, 31.25),
        "detector_pixel_mrad": (0.03308, 0.03308),
        "semiangle_mrad": 1.03,
    }
    said = describe(source)
    with opened(source.path) as file:
        total = file[source.dataset][()].sum(dtype=np.int64)
    assert said["total_counts"] == total
    np.testing.assert_allclose(said["center_of_mass"], (64, 64), atol=3)
    assert said["empty_frames"] == 0
