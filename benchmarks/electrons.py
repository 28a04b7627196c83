"""What sums over electron events cost, against stempy on the same file.

    python benchmarks/electrons.py [--quick] [--json FILE] [--peer PYTHON]

A scan of 256 × 256 positions with about 100 events in frames of 576 × 576 pixels, as the 4D Camera
gives them, in stempy's own format. `--peer` (or SMPR3D_PEERS_PYTHON) is a Python with stempy; it
runs as a process of its own on the same file, with the faster of its two ways to a centre of mass,
and must find the same. A binned frame of both has each pixel once. Records are those of
`smatrix.py`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import h5py
import numpy as np
from smatrix import Case, Cost, machine, measure, show, table, write

from smpr3d_jax.data import electrons
from smpr3d_jax.data.events import EventRows, merge
from smpr3d_jax.data.readers import read, write_stempy
from smpr3d_jax.data.readers.stempy import FRAMES


FRAME = (576, 576)
FLOOR = "floor: h5py's own read"
PEER = """
import json, sys, time
import numpy as np
from stempy.image import com_sparse
from stempy.io.sparse_array import SparseArray
def timed(call, repeats):
    found = []
    for _ in range(repeats):
        core, wall = time.process_time(), time.perf_counter()
        call()
        found.append((time.process_time() - core, time.perf_counter() - wall))
    return min(found)
path, repeats, answers = sys.argv[1], int(sys.argv[2]), sys.argv[3]
scan = SparseArray.from_hdf5(path)
cases = {
    "load": lambda: SparseArray.from_hdf5(path),
    "sum of all frames": lambda: scan.sum(axis=(0, 1)),
    "centre of mass of each frame": lambda: com_sparse(scan, replace_nans=False, version=1),
    "2 x 2 binning": lambda: scan.bin_frames(2),
    "2 x 2 binning of the scan": lambda: scan.bin_scans(2),
}
np.savez(
    answers, total=scan.sum(axis=(0, 1)), binned=scan.bin_frames(2).sum(axis=(0, 1)),
    x_and_y=com_sparse(scan, replace_nans=False, version=1),
)
print(json.dumps({name: timed(call, repeats) for name, call in cases.items()}))
"""


def scan_of(shape: tuple[int, int], mean: float) -> EventRows:
    """Events in a disc, drawn once."""
    rng, size = np.random.default_rng(0), shape[0] * shape[1]
    per_frame = rng.poisson(mean, size)
    radius = 120 * np.sqrt(rng.random(per_frame.sum()))
    angle = 2 * np.pi * rng.random(per_frame.sum())
    y, x = (FRAME[0] / 2 + radius * f(angle) for f in (np.sin, np.cos))
    pixels = y.astype(np.int32) * FRAME[1] + x.astype(np.int32)
    return EventRows(np.append(0, np.cumsum(per_frame)), pixels, FRAME, None)


def bare(path: pathlib.Path) -> list[np.ndarray]:
    """The lists of events as h5py reads them."""
    with h5py.File(path) as file:
        return list(file[FRAMES][()])  # type: ignore[index]


def ours(path: pathlib.Path, shape: tuple[int, int]) -> dict[str, Case]:
    """The same questions, asked of our own rows."""
    source = read(path)
    rows = source.load(source.positions(None))
    y, x = np.ogrid[: FRAME[0], : FRAME[1]]
    disc = np.hypot(y - FRAME[0] / 2, x - FRAME[1] / 2) < 60
    return {
        FLOOR: Case(lambda: bare(path)),
        "load": Case(lambda: source.load(source.positions(None)).pixels),
        "sum of all frames": Case(lambda: electrons.sum_frames(rows)),
        "centre of mass of each frame": Case(lambda: electrons.center_of_mass(rows)),
        "2 x 2 binning": Case(lambda: merge(electrons.bin_detector(rows, 2)).pixels),
        "2 x 2 binning, pixels not joined": Case(lambda: electrons.bin_detector(rows, 2).pixels),
        "virtual image": Case(lambda: electrons.virtual_images(rows, disc)),
        "2 x 2 binning of the scan": Case(lambda: electrons.bin_scan(rows, shape, 2).pixels),
    }


def theirs(path: pathlib.Path, python: str, repeats: int) -> dict[str, Cost]:
    """Costs of stempy, by name."""
    answers = path.with_name("answers.npz")
    command = [python, "-W", "ignore", "-c", PEER, str(path), str(repeats), str(answers)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    check(path, answers)
    found: dict[str, list[float]] = json.loads(answer.splitlines()[-1])
    return {name: Cost(core, wall, None) for name, (core, wall) in found.items()}


def check(path: pathlib.Path, answers: pathlib.Path) -> None:
    """Times mean nothing unless both find the same."""
    peer, source = np.load(answers), read(path)
    rows = source.load(source.positions(None))
    binned = electrons.sum_frames(electrons.bin_detector(rows, 2))
    center = np.asarray(electrons.center_of_mass(rows)).T[::-1].reshape(peer["x_and_y"].shape)
    same = np.array_equal(electrons.sum_frames(rows), peer["total"])
    same &= np.array_equal(binned, peer["binned"])
    if not same or not np.allclose(center, peer["x_and_y"], atol=1e-3, equal_nan=True):
        raise RuntimeError("stempy and we disagree; times mean nothing.")


def main() -> None:
    """Run everything, print the table, write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the records to this file")
    parser.add_argument("--quick", action="store_true", help="a smaller scan, fewer repetitions")
    parser.add_argument("--peer", default=os.environ.get("SMPR3D_PEERS_PYTHON"))
    options = parser.parse_args()
    about, records = machine(), []
    print(json.dumps(about, indent=1))
    shape, repeats = ((64, 64), 3) if options.quick else ((256, 256), 5)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "scan.h5"
        write_stempy(path, scan_of(shape, 100.0), shape)
        own = measure(ours(path, shape), repeats)
        peer = theirs(path, options.peer, repeats) if options.peer else {}
    if not peer:
        print("no peer: give --peer the path of a Python that has stempy")
    bare = own.pop(FLOOR)
    for name, cost in own.items():
        both = {"ours": cost} | ({"stempy": peer[name]} if name in peer else {})
        both |= {FLOOR: bare} if name == "load" else {}
        workload = f"{name}, {shape[0]} x {shape[1]} frames of 100 events"
        floor, other = (what if what in both else None for what in (FLOOR, "stempy"))
        records += table(workload, both, floor, other)
    show(records)
    write(records, options.json, about)


if __name__ == "__main__":
    main()
