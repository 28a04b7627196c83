"""Zarr arrays of either format, in folders and zip files, and abTEM's measurements."""

import json
import shutil

import numpy as np
import pytest
import zarr

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read
from smpr3d_jax.data.readers.chunked import gather_chunked

from .foreign import python_with, run
from .scan_files import flat, FRAME, SCAN
from .tree_files import counts, FACTS, save_abtem, save_zarr


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["scan.zarr", "scan.zarr.zip", "scan"])
def test_groups(tmp_path, version, name):
    save_zarr(tmp_path / name, counts(), version)
    source = read(tmp_path / name)
    assert (source.format, source.dataset) == ("zarr", "scan/frames")
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    index = np.array([7, 14, 0, 7])
    np.testing.assert_array_equal(source.read(index).dense(), flat(counts())[index])
    np.testing.assert_array_equal(source.read(slice(9, 2, -3)).dense(), flat(counts())[9:2:-3])
    assert len(source.read(np.zeros(0, int))) == 0


@pytest.mark.parametrize("version", [2, 3])
def test_an_array_alone(tmp_path, version):
    path = tmp_path / "scan.zarr"
    zarr.create_array(path, data=counts(), zarr_format=version)
    np.testing.assert_array_equal(read(path).read().dense(), flat(counts()))


def test_shards_and_a_stack(tmp_path):
    path = tmp_path / "scan.zarr"
    item = zarr.create_array(
        path, shape=(15, *FRAME), dtype="uint16", chunks=(2, 2, 3), shards=(8, *FRAME)
    )
    item[:] = flat(counts())
    with pytest.raises(InputError, match="scan_shape"):
        read(path)
    source = read(path, scan_shape=SCAN)
    index = np.array([7, 14, 0, 7])
    np.testing.assert_array_equal(source.read(index).dense(), flat(counts())[index])


def test_one_of_several_arrays(tmp_path):
    path = tmp_path / "scan.zarr"
    root = zarr.open_group(path, mode="w")
    for i, name in enumerate(("first", "b/second")):
        root.create_array(name, data=counts(i), chunks=(1, 5, *FRAME))
    with pytest.raises(InputError, match="2 arrays that could be frames: b/second, first"):
        read(path)
    source = read(path, dataset="b/second")
    np.testing.assert_array_equal(source.read().dense(), flat(counts(1)))
    with pytest.raises(InputError, match="no array 'third'; the store has 'b/second', 'first'"):
        read(path, dataset="third")


def test_only_the_chunks_asked_for_are_read(tmp_path):
    path = tmp_path / "scan.zarr"
    save_zarr(path, counts())
    source = read(path)
    shutil.rmtree(path / "scan/frames/c/1")
    index = np.array([0, 9, 6])
    np.testing.assert_array_equal(source.read(index).dense(), flat(counts())[index])
    assert read(path).notes == ("2 of 4 chunks are not stored, and read as 0",)


@pytest.mark.parametrize(
    "index, reads",
    [
        (np.arange(5, 15), 1),
        (np.array([1, 2, 3, 6, 7, 8]), 1),
        (np.array([8, 3, 2, 1, 6, 7, 7]), 1),
        (np.array([0, 1, 2, 3, 4, 5]), 2),
        (np.array([12, 2, 4]), 3),
        (np.zeros(0, int), 0),
    ],
)
def test_chunks_are_read_once(index, reads):
    """A box of positions at once, others chunk by chunk."""
    chunks, read = (2, 3, *FRAME), []

    class Counting:
        shape, ndim, dtype = (*SCAN, *FRAME), 4, np.dtype(np.uint16)

        def __getitem__(self, item):
            read.append(item)
            return counts()[item]

    found = gather_chunked(Counting(), index, chunks)
    np.testing.assert_array_equal(found, flat(counts())[index])
    assert len(read) == reads


def test_a_store_larger_than_memory_is_only_described(tmp_path):
    """A terabyte of zeros that takes no room on the disk, but one frame."""
    item = zarr.create_array(
        tmp_path / "a.zarr", shape=(1000,) * 4, dtype="uint8", chunks=(1, 1, 100, 100)
    )
    item[500, 3, :2, :2] = 7
    source = read(tmp_path / "a.zarr")
    assert len(source) == 10**6
    assert float(source.read(np.array([500_003])).dense()[0, 0, 0]) == 7


def set_json(path, **entries):
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | entries))


def no_json(path):
    (path / "scan/frames/zarr.json").write_text("{")


def another_type(path):
    set_json(path / "scan/frames/zarr.json", data_type="complex64", fill_value=[0, 0])


def another_shape(path):
    set_json(path / "scan/frames/zarr.json", shape=[3, 5, 4, 2**40])


def set_chunks(path, *shape):
    grid = {"name": "regular", "configuration": {"chunk_shape": [*shape, *FRAME]}}
    set_json(path / "scan/frames/zarr.json", chunk_grid=grid)


def unknown_codec(path):
    set_json(path / "scan/frames/zarr.json", codecs=[{"name": "imaginary"}])


def cut_chunk(path):
    chunk = path / "scan/frames/c/1/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-9])


@pytest.mark.parametrize(
    "change, message",
    [
        (no_json, "has no 4D array; the store has 'scan/axis'"),
        (another_type, "complex64, which are not counts"),
        (another_shape, "frames of 4 × 1099511627776 pixels"),
        (lambda path: set_chunks(path, 5, 6), "cannot be read as zarr"),
        (lambda path: set_chunks(path, 2**14, 2**14), r"chunks of \(16384, 16384, 4, 6\)"),
        (unknown_codec, "cannot be read as zarr.*imaginary"),
        (cut_chunk, "cannot be read as zarr"),
        (lambda path: shutil.rmtree(path / "scan"), "has no 4D array; the store has no arrays"),
        (lambda path: (path / "zarr.json").unlink(), "is a folder"),
    ],
)
def test_damaged_stores(tmp_path, change, message):
    path = tmp_path / "scan.zarr"
    save_zarr(path, counts())
    change(path)
    with pytest.raises(InputError, match=f"scan.zarr.*{message}"):
        read(path).read()


def test_abtem(tmp_path):
    save_abtem(tmp_path / "a.zarr", counts())
    source = read(tmp_path / "a.zarr")
    expected = FACTS | {"center": (2, 3), "energy_ev": 8e4, "semiangle_mrad": 25}
    assert source.facts == {key: pytest.approx(value) for key, value in expected.items()}
    assert source.notes == ("written by abTEM: intensities are fractions of one electron",)
    np.testing.assert_allclose(source.read().dense(), flat(counts()) / 100, rtol=1e-6)
    save_abtem(tmp_path / "b.zarr", counts(), axes=3, energy="80 keV", semiangle_cutoff=None)
    assert read(tmp_path / "b.zarr").facts == {}


SIMULATE = """
    import sys, abtem, ase, numpy as np

    atoms = ase.Atoms("C2", positions=[(2, 2, 1), (3, 3, 1)], cell=(5, 6, 2))
    probe = abtem.Probe(energy=80e3, semiangle_cutoff=25, gpts=(40, 48), extent=(5, 6))
    potential = abtem.Potential(atoms, gpts=(40, 48), slice_thickness=1)
    scan = abtem.GridScan(start=(0, 0), end=(1.5, 2.0), gpts=(3, 5))
    detector = abtem.PixelatedDetector(max_angle=60)
    measured = probe.scan(potential, scan=scan, detectors=detector).compute(progress_bar=False)
    measured.to_zarr(sys.argv[1])
    np.save(sys.argv[2], measured.array)
"""


@pytest.mark.slow
def test_a_simulation_of_abtem(tmp_path):
    run(python_with("abtem==1.0.11"), SIMULATE, tmp_path / "a.zarr", tmp_path / "a.npy")
    source, expected = read(tmp_path / "a.zarr"), np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(source.read().dense(), flat(expected))
    assert (source.scan_shape, source.frame_shape) == (SCAN, (18, 20))
    assert source.facts == {
        "scan_step_A": pytest.approx((0.5, 0.4)),
        "detector_pixel_inv_A": pytest.approx((1 / 5, 1 / 6)),
        "center": pytest.approx((9, 10)),
        "energy_ev": 8e4,
        "semiangle_mrad": 25,
    }
