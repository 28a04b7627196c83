"""How fast a pass over a file is and how much memory it takes, against a bare memory map.

    python benchmarks/readers.py [--quick] [--json FILE]

A pass reads every frame once, by `Source.blocks` and `load`, and sums the counts; the floor does
the same sums on a memory map of the file, whose layout it knows, in blocks of the same size. The
files are new and in the system's cache. Records are those of `smatrix.py`. The memory is that of a
process of its own which passes over a file of 3 GB, ten times what it may take, after it has
imported the library (`imported_mb`).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import h5py
import numpy as np
from smatrix import Case, machine, measure, show, table

from smpr3d_jax.data.readers import read
from smpr3d_jax.data.readers.source import Source


FLOOR = "floor: memory map"
HEADER = 384
# The high-water mark of the kernel: that of `resource` includes the process it came from.
ALONE = """
import json, pathlib, sys, time
from smpr3d_jax.data.readers import read
def high_water():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
imported, core, wall = high_water(), time.process_time(), time.perf_counter()
source = read(sys.argv[1], **json.loads(sys.argv[2]))
total = sum(float(source.load(block).sum(dtype=float)) for block in source.blocks())
core, wall = time.process_time() - core, time.perf_counter() - wall
print(json.dumps({"imported": imported, "peak": high_water(), "core": core, "wall": wall}))
"""


class Kind(NamedTuple):
    """A way to keep frames: their shape and type, how to write and how to map them, and hints."""

    name: str
    frame: tuple[int, int]
    dtype: str
    write: Callable[[pathlib.Path, np.ndarray, int], None]
    floor: Callable[[pathlib.Path, tuple[int, int]], Any]
    hinted: bool = False


def write_npy(path: pathlib.Path, block: np.ndarray, times: int) -> None:
    """The block of frames again and again, as rows of a scan."""
    shape = (times, *block.shape)
    with open(path, "wb") as file:
        header = {"descr": block.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(times):
            file.write(block.data)


def map_npy(path: pathlib.Path, scan: tuple[int, int]):
    """Frames of the map, flat."""
    array = np.load(path, mmap_mode="r")
    return array.reshape(-1, *array.shape[2:])


def write_empad(path: pathlib.Path, block: np.ndarray, times: int) -> None:
    """With a footer after each frame."""
    footed = np.concatenate([block, np.zeros((len(block), 2, 128), "<f4")], axis=1)
    with open(path, "wb") as file:
        for _ in range(times):
            file.write(footed.data)


def map_empad(path: pathlib.Path, scan: tuple[int, int]):
    """Frames of the map without their footers."""
    return np.memmap(path, "<f4", "r").reshape(-1, 130, 128)[:, :128]


def write_mib(path: pathlib.Path, block: np.ndarray, times: int) -> None:
    """With a header before each frame, which says the same of all."""
    header = f"MQ1,000001,{HEADER:05d},01,0256,0256,U16,1x1,01,,0.001,0,0,0,MQ1A,,1000000ns,12,"
    padded = np.frombuffer(header.encode().ljust(HEADER, b"\0"), np.uint8)
    pixels = block.astype(">u2").reshape(len(block), -1).view(np.uint8)
    with open(path, "wb") as file:
        for _ in range(times):
            file.write(np.hstack([np.tile(padded, (len(block), 1)), pixels]).data)


def map_mib(path: pathlib.Path, scan: tuple[int, int]):
    """Frames of the map without their headers, in the byte order of the file."""
    records = np.memmap(path, [("header", f"V{HEADER}"), ("frame", ">u2", (256, 256))], "r")
    return records["frame"]


def write_hdf5(path: pathlib.Path, block: np.ndarray, times: int) -> None:
    """One dataset in one piece."""
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (times, *block.shape), block.dtype)
        for i in range(times):
            data[i] = block


def map_hdf5(path: pathlib.Path, scan: tuple[int, int]):
    """Frames of the map, from where the dataset begins."""
    with h5py.File(path, "r") as file:
        data: Any = file["data"]
        shape, dtype, start = data.shape, data.dtype, data.id.get_offset()
    return np.memmap(path, dtype, "r", start, shape).reshape(-1, *shape[2:])


KINDS = (
    Kind("a.npy", (128, 128), "<u2", write_npy, map_npy),
    Kind("b.npy", (256, 256), "u1", write_npy, map_npy),
    Kind("a.raw", (128, 128), "<f4", write_empad, map_empad, True),
    Kind("a.mib", (256, 256), "<u2", write_mib, map_mib, True),
    Kind("a.h5", (128, 128), "<u2", write_hdf5, map_hdf5),
)


def make(kind: Kind, folder: pathlib.Path, size: float) -> tuple[pathlib.Path, tuple[int, int]]:
    """A file of about `size` bytes, and its scan shape."""
    rng, columns = np.random.default_rng(0), 64
    block = rng.poisson(3.0, (columns, *kind.frame)).astype(kind.dtype)
    rows = max(2, round(size / block.nbytes))
    kind.write(folder / kind.name, block, rows)
    return folder / kind.name, (rows, columns)


def hints(kind: Kind, scan: tuple[int, int]) -> dict[str, Any]:
    """What the file does not say."""
    return {"scan_shape": scan} if kind.hinted else {}


def our_sum(source: Source) -> float:
    """Sum of all counts, block after block."""
    return sum(float(source.load(block).sum(dtype=float)) for block in source.blocks())


def bare_sum(source: Source, frames) -> float:
    """The same from a map."""
    runs = (slice(int(block[0]), int(block[-1]) + 1) for block in source.blocks())
    return sum(float(frames[run].sum(dtype=float)) for run in runs)


def speed(kind: Kind, folder: pathlib.Path, size: float, repeats: int) -> list:
    """Seconds of a pass, ours and the bare one."""
    path, scan = make(kind, folder, size)
    source = read(path, **hints(kind, scan))
    if our_sum(source) != bare_sum(source, kind.floor(path, scan)):
        raise RuntimeError(f"{kind.name}: the sums differ; times mean nothing.")
    cases = {
        "blocks and load": Case(lambda: our_sum(source)),
        # A new map every time, as a program that is run once would make.
        FLOOR: Case(lambda: bare_sum(source, kind.floor(path, scan))),
    }
    pixels = f"{kind.frame[0]} x {kind.frame[1]} {kind.dtype}"
    workload = f"pass over {kind.name}, {path.stat().st_size / 1e6:.0f} MB of {pixels}"
    records = table(workload, measure(cases, repeats), FLOOR, None)
    path.unlink()
    return records


def memory(kind: Kind, folder: pathlib.Path, size: float) -> dict:
    """Highest memory of a process that passes over a large file."""
    path, scan = make(kind, folder, size)
    command = [sys.executable, "-c", ALONE, path, json.dumps(hints(kind, scan))]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    workload = f"memory of a pass over {path.stat().st_size / 1e9:.1f} GB"
    path.unlink()
    return {
        "workload": workload,
        "implementation": f"{kind.name}, {kind.dtype}",
        "core_seconds": found["core"],
        "wall_seconds": found["wall"],
        "ratio_to_floor": None,
        "ratio_to_peer": None,
        "peak_rss_mb": found["peak"],
        "imported_mb": found["imported"],
    }


def main() -> None:
    """Run everything, print the table, write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the records to this file")
    parser.add_argument("--quick", action="store_true", help="smaller files and fewer repetitions")
    options = parser.parse_args()
    about, records = machine(), []
    print(json.dumps(about, indent=1))
    size, repeats, large = (64e6, 3, 3e8) if options.quick else (512e6, 15, 3e9)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            records += speed(kind, pathlib.Path(folder), size, repeats)
        records += [memory(kind, pathlib.Path(folder), large) for kind in KINDS]
    show(records)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")
        beside = options.json.with_suffix(".machine.json")
        beside.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
