"""Small files of every format that is read, for tests that go through all of them.

A format joins with an entry of `EXAMPLES`: a function that writes its files into an empty folder
and says which to open, with what hints.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.events import event_rows
from smpr3d_jax.data.readers import write_emd, write_raw_csr

from . import binary_files, tree_files
from .scan_files import flat, lists_of, save_events, save_plain, some_cube, split_entries


Example = tuple[pathlib.Path, dict[str, Any]]


def _emd(folder: pathlib.Path) -> Example:
    write_emd(folder / "a.h5", some_cube(), 0.5, 1.5, 80e3)
    return folder / "a.h5", {}


def _stempy(folder: pathlib.Path) -> Example:
    entries = lists_of(some_cube())
    return save_events(folder / "a.h5", entries, np.arange(15), 3), {"frame_shape": (4, 6)}


def _stempy_1(folder: pathlib.Path) -> Example:
    path = save_events(folder / "a.h5", lists_of(some_cube()), np.arange(15), 1)
    return path, {"frame_shape": (4, 6)}


def _stempy_2(folder: pathlib.Path) -> Example:
    path = save_events(folder / "a.h5", *split_entries(some_cube()), 2)
    return path, {"frame_shape": (4, 6), "drop_flyback": True}


def _raw_csr(folder: pathlib.Path) -> Example:
    rows = event_rows(Frames(flat(some_cube())))
    write_raw_csr(folder / "a.toml", rows, (3, 5), {"scan_step_A": (0.5, 0.25)})
    return folder / "a.toml", {}


def _hdf5(folder: pathlib.Path) -> Example:
    save_plain(folder / "a.h5", some_cube())
    return folder / "a.h5", {}


def _npy(folder: pathlib.Path) -> Example:
    np.save(folder / "a.npy", some_cube())
    return folder / "a.npy", {}


def _npz(folder: pathlib.Path) -> Example:
    np.savez(folder / "a.npz", cube=some_cube(), axis=np.arange(3))
    return folder / "a.npz", {}


def _packed_npz(folder: pathlib.Path) -> Example:
    np.savez_compressed(folder / "a.npz", cube=some_cube(), axis=np.arange(3))
    return folder / "a.npz", {}


def _empad(folder: pathlib.Path) -> Example:
    xml = binary_files.empad_xml("scan_x2_y1.raw", (1, 2))
    binary_files.save_empad(folder / "scan_x2_y1.raw", np.ones((1, 2, 128, 128)), xml)
    return folder / "scan.xml", {}


def _mib(folder: pathlib.Path) -> Example:
    hdr = binary_files.mib_hdr(15, 5)
    binary_files.save_mib(folder / "a.mib", some_cube(dtype=np.uint32), hdr=hdr)
    return folder / "a.hdr", {}


def _raw_mib(folder: pathlib.Path) -> Example:
    cube = np.random.default_rng(0).integers(0, 2, (1, 3, 128, 128), np.uint32)
    binary_files.save_mib(folder / "a.mib", cube, "R64", "2x2G", 1, 4)
    return folder / "a.mib", {"scan_shape": (1, 3)}


def _dm4(folder: pathlib.Path) -> Example:
    tags = {"Meta Data": {"Data Order Swapped": True}, "Microscope Info": {"Voltage": 8e4}}
    images = [binary_files.dm_thumbnail()]
    images += [binary_files.dm_scan(some_cube(dtype="u2"), True, tags)]
    return binary_files.save_dm(folder / "a.dm4", images), {}


def _dm3(folder: pathlib.Path) -> Example:
    images = [binary_files.dm_scan(some_cube(dtype="u2"), False)]
    return binary_files.save_dm(folder / "a.dm3", images, 3), {}


def _tree(save: Callable, name: str, **hints: Any) -> Callable[[pathlib.Path], Example]:
    def make(folder: pathlib.Path) -> Example:
        save(folder / name, some_cube(dtype=np.uint16))
        return folder / name, hints

    return make


EXAMPLES: dict[str, Callable[[pathlib.Path], Example]] = {
    "emd": _emd,
    "stempy": _stempy,
    "stempy 1": _stempy_1,
    "stempy 2": _stempy_2,
    "raw csr": _raw_csr,
    "hdf5": _hdf5,
    "npy": _npy,
    "npz": _npz,
    "packed npz": _packed_npz,
    "empad": _empad,
    "mib": _mib,
    "raw mib": _raw_mib,
    "dm4": _dm4,
    "dm3": _dm3,
    "dectris": _tree(tree_files.save_dectris, "a_master.h5", scan_shape=(3, 5)),
    "dectris channels": _tree(tree_files.save_channels, "a.h5", scan_shape=(3, 5)),
    "nexus": _tree(tree_files.save_nexus, "a.nxs"),
    "hspy": _tree(tree_files.save_hspy, "a.hspy"),
    "zspy": _tree(tree_files.save_zspy, "a.zspy"),
    "zarr": _tree(tree_files.save_zarr, "a.zarr"),
    "zipped zarr": _tree(tree_files.save_zarr, "a.zarr.zip"),
    "berkeley emd": _tree(tree_files.save_berkeley, "a.emd"),
    "py4dstem 0.12": _tree(tree_files.save_py4dstem_12, "a.h5"),
    "py4dstem 0.13": _tree(tree_files.save_py4dstem_13, "a.h5"),
    "matlab": _tree(tree_files.save_matlab, "a.mat"),
}
