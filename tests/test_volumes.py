"""Volumes on disk: plane by plane, calibrated, complete or not there."""

import h5py
import numpy as np
import pytest
import tifffile

from smpr3d_jax.report import store, volumes


DEPTHS = np.arange(-40.0, 15.0, 5.0)
SHAPE = (6, 9)


def volume():
    return np.random.default_rng(0).normal(size=(len(DEPTHS), *SHAPE)).astype(np.float32)


def write(folder, data, sizes=(11,), **geometry):
    geometry = {"depths": DEPTHS, "shape": SHAPE, "pixel_size": 0.4, "origin": (-2, -3)} | geometry
    with volumes.section_writer(folder / "r.h5", folder / "s.tif", **geometry) as writer:
        start = 0
        for size in sizes:
            writer.write(data[start : start + size])
            start += size
        writer.attach({"config": {"title": "tubes"}})


@pytest.mark.parametrize("sizes", [(11,), (1,) * 11, (4, 4, 3)])
def test_both_files_hold_what_was_written_in_any_blocks(tmp_path, sizes):
    data = volume()
    write(tmp_path, data, sizes)
    result = store.load(tmp_path / "r.h5")
    np.testing.assert_array_equal(result["sections"]["phase"], data)
    np.testing.assert_array_equal(result["sections"]["z"], DEPTHS)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "s.tif"), data)
    assert result["config"] == {"title": "tubes"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.h5", "s.tif"]


def test_the_result_keeps_its_contract(tmp_path):
    write(tmp_path, volume())
    for place in ("sections", "sections/phase"):
        facts = store.attributes(tmp_path / "r.h5", place)
        assert facts["pixel_size_A"] == 0.4
        assert facts["origin_A"] == [-2.0, -3.0]
    with h5py.File(tmp_path / "r.h5") as file:
        phase = file["sections/phase"]
        assert isinstance(phase, h5py.Dataset)
        assert (phase.dtype, phase.chunks) == (np.float32, (1, *SHAPE))


def test_imagej_finds_the_scale_the_origin_and_the_depths(tmp_path):
    write(tmp_path, volume(), pixel_size=(0.4, 0.5))
    with tifffile.TiffFile(tmp_path / "s.tif") as file:
        facts = file.imagej_metadata
        assert facts is not None
        assert (facts["slices"], facts["unit"], facts["spacing"]) == (11, "angstrom", 5.0)
        assert (facts["xorigin"], facts["yorigin"], facts["zorigin"]) == (6.0, 5.0, 8.0)
        assert facts["Labels"][1] == "z = -35 Å"
        assert file.series[0].axes == "ZYX"
        tags = file.pages.first.tags
        assert tags["XResolution"].value == (2, 1)
        assert tags["YResolution"].value == (5, 2)


def test_one_plane_is_a_volume(tmp_path):
    data = volume()[:1]
    write(tmp_path, data, (1,), depths=[20])
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "s.tif"), data[0])
    np.testing.assert_array_equal(store.load(tmp_path / "r.h5", "sections/phase"), data)


def test_planes_beyond_four_gigabytes_are_found(tmp_path):
    shape, count = (1024, 1024), 1100  # 4.6 GB, of which the file system keeps one plane
    offset = volumes._allocate_tiff(
        tmp_path / "s.tif", np.arange(float(count)), shape, (1.0, 1.0), (0.0, 0.0)
    )
    last = np.arange(1024 * 1024, dtype=np.float32).reshape(shape)
    with (tmp_path / "s.tif").open("r+b") as file:
        file.seek(offset + (count - 1) * last.nbytes)
        file.write(last.data)
    stack = tifffile.memmap(tmp_path / "s.tif", mode="r")
    assert stack.shape == (count, *shape)
    np.testing.assert_array_equal(stack[-1], last)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ((4, 4), {}, "only 8 of 11 planes"),
        ((11, 1), {}, "after 11 planes does not fit"),
        ((11,), {"shape": (6, 8)}, r"planes of \(6, 8\) pixels"),
        ((11,), {"shape": (0, 8)}, "A plane needs pixels"),
        ((11,), {"pixel_size": 0.0}, "positive pixel size"),
        ((11,), {"depths": []}, "`depths` must be"),
        ((11,), {"depths": [0.0, np.nan]}, "`depths` must be"),
    ],
)
def test_a_failing_writer_leaves_the_old_files_and_nothing_else(tmp_path, sizes, change, message):
    write(tmp_path, volume())
    before = [(tmp_path / name).read_bytes() for name in ("r.h5", "s.tif")]
    extended = np.concatenate([volume(), volume()])
    with pytest.raises(ValueError, match=message):
        write(tmp_path, extended, sizes, **change)
    assert [(tmp_path / name).read_bytes() for name in ("r.h5", "s.tif")] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.h5", "s.tif"]
