"""How fast a pass over a file is and how much memory it takes, against the least that it can cost.

    python benchmarks/readers.py [--quick] [--only WORD] [--json FILE]

A pass reads every frame once, by `Source.blocks` and `load`, and sums the counts. The floor does
the same sums. Of frames that are stored as they are, on a memory map of the file, whose layout it
knows, in blocks of the same size. Compressed frames cannot be mapped: their floor is the bare
library (h5py with hdf5plugin, or zarr), which opens each file once and unpacks each chunk once, as
many along a row of chunks as 4 MB hold, at least one; beside it stands a memory map of the same
counts in a .npy file, which shows what the compression costs. The files are new and in the system's
cache. Records are those of `smatrix.py`. The memory is that of a process of its own which passes
over 3 GB of counts, ten times what it may take, after it has imported the reader (`imported_mb`).
"""

import argparse
import functools
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import h5py
import hdf5plugin
import numpy as np
import zarr
from smatrix import Case, machine, measure, show, table, write

from smpr3d_jax.data.readers import read
from smpr3d_jax.data.readers.source import Source


MAP, LIBRARY = "floor: memory map", "floor: bare library"
BLOCK, HEADER = 2**22, 384
# What HyperSpy chooses for frames of this size, and what covers much of a scan.
FEW, MANY = (5, 5, 128, 128), (32, 32, 128, 128)
PACKED = dict(hdf5plugin.Bitshuffle(cname="lz4"))
STACK = 16
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
    """A way to keep frames: their shape and type, how to write them, and hints.

    `floor` gives all frames as a map, or, of `chunks`, in parts.
    """

    name: str
    frame: tuple[int, int]
    dtype: str
    write: Callable[[pathlib.Path, np.ndarray, int], None]
    floor: Callable[[pathlib.Path, tuple[int, int]], Any]
    hinted: bool = False
    chunks: str = ""


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


def fill(data: Any, block: np.ndarray, times: int, rows: int) -> None:
    """The block as each row of an array on disk, whole rows of chunks at a time."""
    for i in range(0, times, rows):
        many = min(rows, times - i)
        data[i : i + many] = np.broadcast_to(block, (many, *block.shape))


def write_hspy(chunks, packed, path: pathlib.Path, block: np.ndarray, times: int) -> None:
    """A signal in chunks, with the least that says that it is one."""
    with h5py.File(path, "w") as file:
        file.attrs["file_format"] = "HyperSpy"
        shape = (times, *block.shape)
        some = tuple(map(min, chunks, shape))
        data = file.create_dataset("Experiments/a/data", shape, block.dtype, chunks=some, **packed)
        fill(data, block, times, chunks[0])


def write_zspy(chunks, path: pathlib.Path, block: np.ndarray, times: int) -> None:
    """The same in a zarr store of format 2, compressed as zarr does by default."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.attrs["file_format"] = "ZSpy"
    shape = (times, *block.shape)
    data = root.create_array("Experiments/a/data", shape=shape, chunks=chunks, dtype=block.dtype)
    fill(data, block, times, chunks[0])


def stacks(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Names of data files beside a master."""
    base = path.name.removesuffix("_master.h5")
    return (path.with_name(f"{base}_data_{i:06d}.h5") for i in itertools.count(1))


def write_master(path: pathlib.Path, block: np.ndarray, times: int) -> None:
    """Frames compressed one by one, in data files of 1024 behind the links of a master."""
    with h5py.File(path, "w") as master:
        rows = (min(STACK, times - i) for i in range(0, times, STACK))
        for i, (beside, many) in enumerate(zip(stacks(path), rows, strict=False), 1):
            with h5py.File(beside, "w") as file:
                shape, chunks = (many * len(block), *block.shape[1:]), (1, *block.shape[1:])
                name = "entry/data/data"
                data = file.create_dataset(name, shape, block.dtype, chunks=chunks, **PACKED)
                for j in range(many):
                    data[j * len(block) : (j + 1) * len(block)] = block
            master[f"entry/data/data_{i:06d}"] = h5py.ExternalLink(beside.name, name)


def parts_of(item: Any) -> Iterator[np.ndarray]:
    """An array on disk, each chunk unpacked once."""
    shape, chunks = item.shape, list(item.chunks)
    along = len(shape) - 3
    size = np.prod([*chunks[: along + 1], *shape[-2:]]) * item.dtype.itemsize
    chunks[along] *= max(1, BLOCK // int(size))
    chunks[-2:] = shape[-2:]
    for start in itertools.product(*(range(0, n, c) for n, c in zip(shape, chunks, strict=True))):
        yield item[tuple(slice(a, a + c) for a, c in zip(start, chunks, strict=True))]


def bare_hspy(path: pathlib.Path, scan: tuple[int, int]) -> Iterator[np.ndarray]:
    """The parts of the signal."""
    with h5py.File(path, "r") as file:
        yield from parts_of(file["Experiments/a/data"])


def bare_zspy(path: pathlib.Path, scan: tuple[int, int]) -> Iterator[np.ndarray]:
    """The parts of the signal."""
    root: Any = zarr.open_group(path, mode="r")
    yield from parts_of(root["Experiments/a/data"])


def bare_master(path: pathlib.Path, scan: tuple[int, int]) -> Iterator[np.ndarray]:
    """The parts of each data file."""
    for beside in itertools.takewhile(pathlib.Path.exists, stacks(path)):
        with h5py.File(beside, "r") as file:
            yield from parts_of(file["entry/data/data"])


def hspy(name: str, chunks: tuple[int, int, int, int], how: str, packed: dict[str, Any]) -> Kind:
    """A kind of HyperSpy files."""
    said = f"{chunks[0]} x {chunks[1]} frames, {how}"
    write = functools.partial(write_hspy, chunks, packed)
    return Kind(name, chunks[2:], "<u2", write, bare_hspy, chunks=said)


def zspy(name: str, chunks: tuple[int, int, int, int]) -> Kind:
    """A kind of HyperSpy's zarr stores."""
    said = f"{chunks[0]} x {chunks[1]} frames, Blosc"
    write = functools.partial(write_zspy, chunks)
    return Kind(name, chunks[2:], "<u2", write, bare_zspy, chunks=said)


KINDS = (
    Kind("a.npy", (128, 128), "<u2", write_npy, map_npy),
    Kind("b.npy", (256, 256), "u1", write_npy, map_npy),
    Kind("a.raw", (128, 128), "<f4", write_empad, map_empad, True),
    Kind("a.mib", (256, 256), "<u2", write_mib, map_mib, True),
    Kind("a.h5", (128, 128), "<u2", write_hdf5, map_hdf5),
    hspy("a.hspy", FEW, "gzip", {"compression": "gzip", "compression_opts": 1}),
    hspy("b.hspy", FEW, "bitshuffle-LZ4", PACKED),
    hspy("c.hspy", MANY, "bitshuffle-LZ4", PACKED),
    zspy("a.zspy", FEW),
    zspy("b.zspy", MANY),
    Kind(
        "a_master.h5", (128, 128), "<u2", write_master, bare_master, True, "a frame, bitshuffle-LZ4"
    ),
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


def mapped_parts(source: Source, frames) -> Iterable[np.ndarray]:
    """A map in blocks."""
    return (frames[block[0] : block[-1] + 1] for block in source.blocks(BLOCK))


def bare_sum(parts: Iterable[np.ndarray]) -> float:
    """The same of arrays."""
    return sum(float(part.sum(dtype=float)) for part in parts)


def clear(folder: pathlib.Path) -> None:
    """Remove what is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def speed(kind: Kind, folder: pathlib.Path, size: float, repeats: int) -> list:
    """Seconds of a pass, ours and the bare one."""
    path, scan = make(kind, folder, size)
    source = read(path, **hints(kind, scan))
    # A new map every time, as a program that is run once would make.
    mapped = lambda: mapped_parts(source, kind.floor(path, scan))
    floor, bare = (LIBRARY, lambda: kind.floor(path, scan)) if kind.chunks else (MAP, mapped)
    if our_sum(source) != bare_sum(bare()):
        raise RuntimeError(f"{kind.name}: the sums differ; times mean nothing.")
    cases = {
        "blocks and load": Case(lambda: our_sum(source)),
        floor: Case(lambda: bare_sum(bare())),
    }
    if kind.chunks:
        plain = folder / "unpacked.npy"
        np.save(plain, np.concatenate([source.load(block) for block in source.blocks()]))
        unpacked = lambda: mapped_parts(source, np.load(plain, mmap_mode="r"))
        cases["memory map of the counts, unpacked"] = Case(lambda: bare_sum(unpacked()))
    mb = np.prod([*scan, *kind.frame]) * np.dtype(kind.dtype).itemsize / 1e6
    pixels = f"{kind.frame[0]} x {kind.frame[1]} {kind.dtype}"
    chunks = f", chunks of {kind.chunks}" if kind.chunks else ""
    workload = f"pass over {kind.name}, {mb:.0f} MB of {pixels}{chunks}"
    records = table(workload, measure(cases, repeats), floor, None)
    clear(folder)
    return records


def memory(kind: Kind, folder: pathlib.Path, size: float) -> dict:
    """Highest memory of a process that passes over a large file."""
    path, scan = make(kind, folder, size)
    command = [sys.executable, "-c", ALONE, path, json.dumps(hints(kind, scan))]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    clear(folder)
    chunks = f", chunks of {kind.chunks}" if kind.chunks else ""
    return {
        "workload": f"memory of a pass over {size / 1e9:.1f} GB",
        "implementation": f"{kind.name}, {kind.dtype}{chunks}",
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
    parser.add_argument("--only", default="", help="only kinds whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="smaller files and fewer repetitions")
    options = parser.parse_args()
    about, records = machine(), []
    print(json.dumps(about, indent=1))
    size, repeats, large = (64e6, 3, 3e8) if options.quick else (512e6, 15, 3e9)
    kinds = [kind for kind in KINDS if options.only in kind.name]
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            records += speed(kind, pathlib.Path(folder), size, repeats)
        records += [memory(kind, pathlib.Path(folder), large) for kind in kinds]
    show(records)
    write(records, options.json, about)


if __name__ == "__main__":
    main()
