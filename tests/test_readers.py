"""Dense frames come back as they were stored; what cannot be read is named with its remedy."""

import pathlib
import zipfile

import h5py
import jax
import numpy as np
import pytest

from smpr3d_jax.data import readers
from smpr3d_jax.data.counts import Frames, InputError
from smpr3d_jax.data.readers import (
    check_series,
    read,
    write_emd,
)
from smpr3d_jax.data.readers.binary import Records
from smpr3d_jax.data.readers.source import Source

from .helpers import shared_data
from .scan_files import (
    flat,
    FRAME,
    opened,
    save_plain,
    SCAN,
    some_cube,
)


def save_fortran(path, cube):
    np.save(path, np.asfortranarray(cube))


def save_big_endian(path, cube):
    np.save(path, cube.astype(">u2"))


DENSE = {
    "emd.h5": lambda p, c: write_emd(p, c, 0.5, 1.5),
    "plain.h5": save_plain,
    "stack.npy": lambda p, c: np.save(p, c),
    "fortran.npy": save_fortran,
    "big.npy": save_big_endian,
    "stored.npz": lambda p, c: np.savez(p, cube=c, axis=np.arange(3)),
    "packed.npz": lambda p, c: np.savez_compressed(p, cube=c, axis=np.arange(3)),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("suffix", [True, False])
def test_dense_formats(tmp_path, name, suffix):
    cube = some_cube()
    DENSE[name](tmp_path / name, cube)
    path = (tmp_path / name).rename(tmp_path / (name if suffix else "no_suffix"))
    source = read(path)
    assert (source.scan_shape, source.frame_shape, source.kind) == (SCAN, FRAME, "dense")
    counts = source.read()
    assert isinstance(counts, Frames)
    assert counts.values.dtype == ("uint16" if name == "big.npy" else "uint8")
    np.testing.assert_array_equal(counts.values, flat(cube))
    index = np.array([14, 3, 4, 3, 5])
    np.testing.assert_array_equal(source.read(index).dense(), flat(cube)[index])
    np.testing.assert_array_equal(source.read(slice(4, 11)).dense(), flat(cube)[4:11])
    assert len(source.read(np.zeros(0, int))) == 0
    with pytest.raises(InputError, match="no scan position 15.*0 to 14"):
        source.read(np.array([2, 15]))


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5"])
def test_a_stack_needs_its_scan_shape(tmp_path, suffix):
    path, stack = tmp_path / f"stack.{suffix}", flat(some_cube())
    if suffix == "h5":
        with opened(path, "w") as file:
            file["stack"] = stack
    else:
        {"npy": np.save, "npz": np.savez}[suffix](path, stack)
    with pytest.raises(InputError, match="scan_shape"):
        read(path)
    with pytest.raises(InputError, match="15 frames.*asks for 12"):
        read(path, scan_shape=(3, 4))
    source = read(path, scan_shape=SCAN)
    np.testing.assert_array_equal(source.read(np.array([7, 1])).dense(), stack[[7, 1]])


def test_hints_must_agree(tmp_path):
    np.save(tmp_path / "a.npy", some_cube())
    assert read(tmp_path / "a.npy", scan_shape=(15, 1)).scan_shape == (15, 1)
    with pytest.raises(InputError, match=r"a\.npy.*\(4, 6\).*\(6, 4\)"):
        read(tmp_path / "a.npy", frame_shape=(6, 4))
    with pytest.raises(InputError, match="no format 'dm5'.*emd"):
        read(tmp_path / "a.npy", format="dm5")


def test_one_of_several_datasets(tmp_path):
    path = tmp_path / "two.h5"
    with opened(path, "w") as file:
        file["first"], file["second"] = some_cube(0), some_cube(1)
    with pytest.raises(InputError, match="2 4D datasets: /first, /second"):
        read(path)
    source = read(path, dataset="second")
    np.testing.assert_array_equal(source.read().dense(), flat(some_cube(1)))
    with pytest.raises(InputError, match=r"no dataset 'third'.*/first \(3, 5, 4, 6\)"):
        read(path, dataset="third")
    np.savez(tmp_path / "two.npz", first=some_cube(0), second=some_cube(1))
    with pytest.raises(InputError, match="2 arrays to choose from"):
        read(tmp_path / "two.npz")
    source = read(tmp_path / "two.npz", dataset="second")
    np.testing.assert_array_equal(source.read().dense(), flat(some_cube(1)))


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint64, bool, np.float16])
def test_wide_types_become_what_jax_keeps(tmp_path, dtype):
    cube = (some_cube() > 0).astype(dtype)
    np.save(tmp_path / "a.npy", cube)
    values = read(tmp_path / "a.npy").read().dense()
    np.testing.assert_array_equal(values, flat(cube).astype(float))


def test_a_count_too_large_for_the_device(tmp_path):
    cube = some_cube(dtype=np.int64)
    cube[1, 2, 3, 3] = 2**40
    np.save(tmp_path / "a.npy", cube)
    with jax.enable_x64(False), pytest.raises(InputError, match="1099511627776 .* into int32"):
        read(tmp_path / "a.npy").read()


def truncated(path):
    save_plain(path, some_cube())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def no_frames(path):
    with opened(path, "w") as file:
        file["image"] = np.zeros((4, 5))


def python_objects(path):
    with open(path, "wb") as file:
        np.save(file, np.array([[{}]]), allow_pickle=True)


def cut_npy(path):
    with open(path, "wb") as file:
        np.save(file, some_cube())
    path.write_bytes(path.read_bytes()[:-40])


def complex_waves(path):
    with open(path, "wb") as file:
        np.save(file, some_cube() * 1j)


def two_axes(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros((4, 5)))


def damaged_chunk(path):
    save_plain(path, some_cube())
    with opened(path) as file:
        where = file["a/b/data"].id.get_chunk_info(2).byte_offset
    data = bytearray(path.read_bytes())
    data[where : where + 8] = b"\0" * 8
    path.write_bytes(data)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "does not exist; check the path"),
        (pathlib.Path.mkdir, "is a folder"),
        (lambda p: p.write_bytes(b""), "none of the known formats"),
        (lambda p: p.write_text("scan"), "not HDF5 and not a numpy file, but begins with b'scan'"),
        (truncated, "cannot be read as HDF5 .*truncated.*copy it again"),
        (no_frames, r"no 4D dataset .*/image \(4, 5\) float64"),
        (python_objects, "Python objects"),
        (cut_npy, "cut short"),
        (complex_waves, "complex128, which are not counts"),
        (two_axes, r"shape \(4, 5\); frames need four axes"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "choose from"),
    ],
)
def test_unreadable_files(tmp_path, make, message):
    path = tmp_path / "scan_0.h5"
    make(path)
    with pytest.raises(InputError, match=f"scan_0.h5.*{message}"):
        read(path)


def test_a_damaged_chunk(tmp_path):
    damaged_chunk(tmp_path / "scan.h5")
    with pytest.raises(InputError, match="scan.h5: cannot be read"):
        read(tmp_path / "scan.h5").read()


class Counting:
    """An array that remembers how many of its frames were read."""

    shape, ndim, dtype = (*SCAN, *FRAME), 4, np.dtype(np.uint8)

    def __init__(self):
        self.read = 0

    def __getitem__(self, item):
        part = some_cube()[item]
        self.read += part.size // np.prod(FRAME)
        return part


def test_gather_reads_only_what_is_asked_for():
    array = Counting()
    found = readers.source.gather(array, np.array([9, 2, 10, 2]))
    np.testing.assert_array_equal(found, flat(some_cube())[[9, 2, 10, 2]])
    assert array.read == 3


@pytest.mark.parametrize("kind", ["hdf5", "numpy"])
def test_a_file_larger_than_memory_is_only_described(tmp_path, kind):
    """A terabyte of zeros that takes no room on the disk, but one frame."""
    path, shape = tmp_path / "huge", (1000, 1000, 1000, 1000)
    if kind == "hdf5":
        with opened(path, "w") as file:
            data = file.create_dataset("data", shape, np.uint8, chunks=(1, 1, 100, 100))
            data[500, 3, :2, :2] = 7
    else:
        with open(path, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            file.truncate(start + 10**12)
            file.seek(start + (500 * 1000 + 3) * 10**6)
            file.write(b"\7")
    source = read(path)
    assert (source.format, len(source)) == (kind, 10**6)
    assert float(source.read(np.array([500_003])).dense()[0, 0, 0]) == 7


def test_register_a_format(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_FORMATS", dict(readers._FORMATS))
    cube = flat(some_cube())

    def describe_mine(path, **hints):
        dtype = np.dtype(np.uint8)
        return Source(path, "mine", "", SCAN, FRAME, dtype, "dense", lambda i: cube[i], hints)

    readers.register("mine", lambda p: p.read_bytes()[:4] == b"mine", describe_mine)
    (tmp_path / "scan.h5").write_bytes(b"mine")
    source = read(tmp_path / "scan.h5", gain=3)
    assert (source.format, source.facts) == ("mine", {"gain": 3})
    np.testing.assert_array_equal(source.read(np.array([4])).dense(), cube[[4]])
    np.save(tmp_path / "a.npy", some_cube())
    assert read(tmp_path / "a.npy").format == "numpy"


def test_dense_and_thinned_series_agree():
    for scan in ("scan_0.h5", "scan_3.h5"):
        dense = read(shared_data("nanotubes_series", scan))
        events = read(shared_data("nanotubes_events", scan))
        assert (dense.format, events.format) == ("emd", "stempy")
        assert dense.scan_shape == events.scan_shape == (40, 40)
        assert dense.facts["scan_step_A"] == (0.4, 0.4)
        np.testing.assert_allclose(dense.facts["detector_pixel_mrad"], 1.7399, atol=1e-4)
        assert dense.facts["semiangle_mrad"] == 25
        assert "rotation_deg" not in dense.facts
        assert check_series([dense, events]) == ()
        index = np.arange(0, 1600, 37)
        all_counts, thinned = dense.read(index).dense(), events.read(index).dense()
        assert bool((thinned <= all_counts).all())
        np.testing.assert_allclose(thinned.sum() / all_counts.sum(), 0.05, rtol=0.02)


@pytest.mark.parametrize("together, sizes", [(1, [8, 7]), (5, [5, 5, 5]), (15, [15]), (None, [15])])
def test_blocks_take_what_is_stored_together(monkeypatch, together, sizes):
    dtype = np.dtype(np.uint8)
    source = Source(
        pathlib.Path("a"), "mine", "", SCAN, FRAME, dtype, "dense", lambda i: i, together=together
    )
    monkeypatch.setattr(readers.source, "BLOCK_BYTES", 8 * 24)
    assert [len(block) for block in source.blocks()] == sizes
    monkeypatch.setattr(readers.source, "MOST_BYTES", 10 * 24)
    assert max(len(block) for block in source.blocks()) <= 10
    assert [len(block) for block in source.blocks(4 * 24)] == [4, 4, 4, 3]


@pytest.mark.parametrize("start", [0, 512])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "f4", "?"])
def test_hdf5_in_one_piece(tmp_path, start, dtype):
    """Read without the library, but for types that it has to convert."""
    cube = some_cube(dtype=dtype)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=start) as file:
        file["data"] = cube
    source = read(tmp_path / "a.h5")
    assert isinstance(source.load, Records) == (dtype != "?")
    index = np.array([14, 3, 4, 3, 5])
    np.testing.assert_array_equal(source.load(index), flat(cube)[index])
    assert source.load(index).dtype == np.dtype(dtype).newbyteorder("=")
    assert source.together == 1


def test_hdf5_with_numbers_of_few_bits(tmp_path):
    """Twelve of sixteen bits hold the number: not what is in the file as it is."""
    kind = h5py.h5t.NATIVE_UINT16.copy()
    kind.set_precision(12)
    cube = some_cube(dtype=np.uint16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple(cube.shape)
        item = h5py.h5d.create(file.id, b"data", kind, space)
        item.write(h5py.h5s.ALL, h5py.h5s.ALL, cube)
    source = read(tmp_path / "a.h5")
    assert not isinstance(source.load, Records)
    np.testing.assert_array_equal(source.load(np.arange(15)), flat(cube))
