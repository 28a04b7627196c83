"""A heap of an HDF5 file that lost a block is refused: the HDF5 library would read it for ever."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import heaps, read, write_emd

from .scan_files import lists_of, save_events, some_cube
from .tree_files import save_channels


def save_texts(path):
    write_emd(path, some_cube(), 0.5, 1.5)
    return path


def save_lists(path):
    cube = np.tile(some_cube(), (1, 1, 1, 1))
    return save_events(path, lists_of(cube), np.arange(15), 3)


@pytest.mark.parametrize("save", [save_texts, save_lists])
@pytest.mark.parametrize("lost", [(0, 16), (64, 512), (8, 16)])
def test_a_lost_block(tmp_path, save, lost):
    path = save(tmp_path / "a.h5")
    heaps.check_heaps(path)
    data = bytearray(path.read_bytes())
    heap = data.index(heaps.START)
    start, stop = (heap + 16 + place for place in lost)
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"a.h5: .*the heap at byte {heap} is damaged.*copy it"):
        read(path, frame_shape=(4, 6))


def test_both_ends_of_a_large_file(tmp_path, monkeypatch):
    """As far as the part at each end goes, whatever lies between."""
    path = save_texts(tmp_path / "a.h5")
    data = path.read_bytes()
    heap = data.index(heaps.START)
    monkeypatch.setattr(heaps, "LOOKED_AT", heap + 100)
    heaps.check_heaps(path)
    bad = bytearray(data[heap : heap + 64])
    bad[24:32] = bytes(8)
    bad[16:18] = bytes(2)
    path.write_bytes(data + bytes(10_000) + bad)
    with pytest.raises(InputError, match=f"heap at byte {len(data) + 10_000} "):
        heaps.check_heaps(path)


@pytest.mark.parametrize(
    "text, value", [(b"", 0xDEADBEEF), (b"Four score and seven years ago", 0x17770551)]
)
def test_checksum(text, value):
    """The values that its author gives with the algorithm."""
    assert heaps.checksum(text) == value


def test_the_list_of_a_virtual_dataset(tmp_path):
    """Whatever byte of the list or of its checksum is wrong."""
    path = tmp_path / "a.h5"
    save_channels(path, some_cube(dtype=np.uint16))
    heaps.check_heaps(path)
    data = path.read_bytes()
    first = data.index(b"a_data_000001.h5\0data\0") - 9
    length = int.from_bytes(data[first - 8 : first], "little")
    for place in range(first, first + length, 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 + place % 100
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="heap at byte"):
            heaps.check_heaps(path)
