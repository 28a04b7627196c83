"""Records of a file: any length, anything between them, either byte order, in any order."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import binary
from smpr3d_jax.data.readers.binary import complete_records, Planes, Records


def save_records(path, arrays, start, rest, last=True):
    """Arrays with `rest` bytes after each; after the last one only if told."""
    parts = [array.tobytes() + b"\xff" * rest for array in arrays]
    data = b"\xee" * start + b"".join(parts)
    path.write_bytes(data if last or not rest else data[:-rest])


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", ">f4"])
@pytest.mark.parametrize("rest", [0, 3, 512])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("way", ["scattered", "buffer", "no preadv"])
def test_records(tmp_path, monkeypatch, dtype, rest, last, way):
    monkeypatch.setattr(binary, "SCATTERED_BYTES", 0 if way != "buffer" else 2**30)
    monkeypatch.setattr(binary, "ONE_CALL", 4)
    monkeypatch.setattr(binary, "PIECE_BYTES", 1000)
    monkeypatch.setattr(binary, "CAN_SCATTER", way != "no preadv" and binary.CAN_SCATTER)
    arrays = np.random.default_rng(0).integers(0, 250, (23, 3, 5)).astype(dtype)
    save_records(tmp_path / "a", arrays, 7, rest, last)
    length = arrays[0].nbytes
    records = Records(tmp_path / "a", 7, length + rest, (3, 5), np.dtype(dtype))
    for index in ([0], range(23), [22, 3, 4, 5, 3], []):
        found = records(np.array(index, int))
        assert found.dtype == np.dtype(dtype).newbyteorder("=") and found.dtype.isnative
        np.testing.assert_array_equal(found, arrays[list(index)])
    with pytest.raises(InputError, match="a: ended .* bytes too early"):
        records(np.arange(20, 24))
    whole = 23 if last or not rest else 22
    assert complete_records(tmp_path / "a", 7, length + rest)[0] == whole


@pytest.mark.parametrize("dtype", ["u1", ">u2"])
def test_planes(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(binary, "PLANES_BYTES", 100)
    frames = np.random.default_rng(0).integers(0, 250, (15, 4, 6)).astype(dtype)
    (tmp_path / "a").write_bytes(b"\xee" * 9 + np.moveaxis(frames, 0, 2).tobytes())
    planes = Planes(tmp_path / "a", 9, (4, 6), 15, np.dtype(dtype))
    for index in ([0], range(15), [14, 3, 4, 5, 3], [9, 2], []):
        found = planes(np.array(index, int))
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, frames[list(index)])
    (tmp_path / "a").write_bytes(bytes(50))
    with pytest.raises(InputError, match="become shorter"):
        planes(np.arange(3))
