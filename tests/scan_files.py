"""Small scans, neither square in the scan nor on the detector, and files of them."""

from typing import Any

import h5py
import numpy as np


SCAN, FRAME = (3, 5), (4, 6)


def some_cube(seed=0, dtype: Any = np.uint8, mean=2.0):
    return np.random.default_rng(seed).poisson(mean, (*SCAN, *FRAME)).astype(dtype)


def opened(path, mode: Any = "r", **how: Any) -> Any:
    return h5py.File(path, mode, **how)


def flat(cube):
    return cube.reshape(-1, *cube.shape[2:])


def lists_of(cube, seed=1):
    """Shuffled detector indices of each frame, an electron an entry."""
    rng = np.random.default_rng(seed)
    indices = np.arange(np.prod(cube.shape[2:]), dtype=np.uint32)
    return [rng.permutation(np.repeat(indices, frame.ravel())) for frame in flat(cube)]


def save_events(path, entries, positions, version, scan=SCAN, frame=FRAME):
    """The layout that stempy writes, with (Nx, Ny) of the frame as its rows and columns."""
    with opened(path, "w") as file:
        if version > 1:
            file.attrs["version"] = version
        item = file.create_dataset("electron_events/scan_positions", data=positions)
        item.attrs["Nx"], item.attrs["Ny"] = scan[1], scan[0]
        kind = h5py.vlen_dtype(np.uint32)
        item = file.create_dataset("electron_events/frames", (len(entries),), kind)
        item.attrs["Nx"], item.attrs["Ny"] = frame
        for i, entry in enumerate(entries):
            item[i] = entry
    return path


def split_entries(cube):
    """Two entries a position, the second with a few electrons, in a shuffled order."""
    entries, positions = [], []
    for position, events in enumerate(lists_of(cube)):
        entries += [events[:-3], events[-3:]]
        positions += [position, position]
    order = np.random.default_rng(2).permutation(len(entries))
    return [entries[i] for i in order], np.array(positions)[order]


def save_plain(path, cube):
    with opened(path, "w") as file:
        file.create_dataset("a/b/data", data=cube, chunks=(1, 2, *FRAME), compression="gzip")
        file["a/axis"] = np.arange(3)
