"""HDF5 in general: whose mistake an error is, what is not believed, what is said of storage."""

from typing import Any

import h5py
import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read
from smpr3d_jax.data.readers.damage import raised_in
from smpr3d_jax.data.readers.hdf5 import attribute, attributes, number, opened as ours, text

from .scan_files import flat, opened, SCAN, some_cube


@pytest.fixture
def path(tmp_path):
    with opened(tmp_path / "a.h5", "w") as file:
        file["frames"] = some_cube()
    return tmp_path / "a.h5"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda file: file["nothing"],
        lambda file: file["frames"][0, 0, 0, 0, 0],
        lambda file: file["frames"][99],
        lambda file: file["frames"].attrs["nothing"],
        lambda file: file.create_group("new"),
    ],
)
def test_errors_of_the_library_name_the_file(path, mistake):
    with pytest.raises(InputError, match=r"a\.h5: cannot be read as HDF5"), ours(path) as file:
        mistake(file)


@pytest.mark.parametrize("error", [KeyError("ours"), OSError("ours"), InputError("ours")])
def test_errors_of_our_own_stay_what_they_are(path, error):
    with pytest.raises(type(error)) as found, ours(path):
        raise error
    assert found.value is error


def test_where_an_error_arose():
    with pytest.raises(ValueError) as found:
        np.zeros(3).reshape(2, 2)
    assert not raised_in("numpy", found.value)
    with pytest.raises(np.linalg.LinAlgError) as found:
        np.linalg.inv(np.zeros((2, 2)))
    assert raised_in("numpy", found.value)
    assert not raised_in("h5py", found.value)


def test_attributes(path):
    """Numbers and text are read, of whatever kind; nothing else is."""
    with opened(path, "a") as file:
        item = file["frames"]
        item.attrs.update(a=1.5, b="nm", c=np.bytes_("nm"), d=True, e=[1, 2], f=["y", "x"])
        item.attrs["g"] = item.ref
        item.attrs["h"] = np.array([item.ref], h5py.ref_dtype)
        lists = np.empty(1, object)
        lists[0] = np.array([3, 4], np.int32)
        item.attrs.create("k", lists, dtype=h5py.vlen_dtype(np.int32))
        item.attrs["i"] = np.array((1, 2.0), [("x", int), ("y", float)])
        item.attrs["j"] = h5py.Empty("f")
    with ours(path) as file:
        item: Any = file["frames"]
        found = attributes(item)
        assert "".join(sorted(found)) in ("abcdef", "abcdefj")
        assert (number(found["a"]), number(found["d"]), number(found["e"])) == (1.5, 1, 1.5)
        assert text(found["b"]) == text(found["c"]) == "nm"
        assert [text(name) for name in found["f"]] == ["y", "x"]
        assert attribute(item, "nothing") is None
        values = (attribute(item, name) for name in "bcfghijk")
        assert [number(value) for value in values] == [None] * 8


def test_numbers_and_text(path):
    with opened(path, "a") as file:
        file.update({"n": 2.5, "many": [1.0, 2.0], "word": "nm", "nan": np.nan, "none": []})
        assert [number(file[n]) for n in ("n", "many")] == [2.5, 1.5]
        assert [number(file[n]) for n in ("word", "nan", "none")] == [None] * 3
        assert (text(file["word"]), text(file["n"]), text(file["many"])) == ("nm", None, None)
    assert text(b"\xff") == text("\udcff") == "\N{REPLACEMENT CHARACTER}"


def test_chunks_that_were_never_written(tmp_path):
    with opened(tmp_path / "a.h5", "w") as file:
        item = file.create_dataset("a", (*SCAN, 4, 6), "u1", chunks=(1, 5, 4, 6), fillvalue=0)
        item[:2] = some_cube()[:2]
    source = read(tmp_path / "a.h5")
    assert source.notes == ("1 of 3 chunks were never written, and read as 0",)
    np.testing.assert_array_equal(source.read().dense()[:10], flat(some_cube())[:10])


def test_sizes_that_are_not_believed(tmp_path):
    with opened(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (3, 5, 2**13, 2**13), "u1", chunks=(1, 2, 2**13, 2**13))
    with pytest.raises(InputError, match="but only 0 bytes in all; the file is damaged"):
        read(tmp_path / "a.h5")
    for shape in ((3, 5, 2**15, 2**15), (2**20, 2**20, 4, 6)):
        with opened(tmp_path / "a.h5", "w") as file:
            file.create_dataset("a", shape, "u1", chunks=(1, 1, 4, 6))
        with pytest.raises(InputError, match="more than any detector gives"):
            read(tmp_path / "a.h5")


def test_frames_in_other_files(tmp_path):
    """A virtual dataset reads as zeros where a file is missing: it is refused."""
    layout = h5py.VirtualLayout((*SCAN, 4, 6), "u1")
    for i in range(3):
        with opened(tmp_path / f"row_{i}.h5", "w") as file:
            file["row"] = some_cube()[i]
        layout[i] = h5py.VirtualSource(f"row_{i}.h5", "row", (5, 4, 6))
    with opened(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("all", layout)
    source = read(tmp_path / "all.h5")
    np.testing.assert_array_equal(source.read().dense(), flat(some_cube()))
    (tmp_path / "row_1.h5").unlink()
    with pytest.raises(InputError, match=r"all\.h5: .*row_1\.h5 is missing; copy it beside"):
        read(tmp_path / "all.h5")
