"""Damaged files: the small examples of every format, mutated, and a process apart that reads them.

A mutant must be refused with InputError, or read as the shape it claims, without much memory or
time. The process is apart because libraries in C may crash, or hang.
"""

import faulthandler
import json
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from .examples import EXAMPLES


ROOM_BYTES, SECONDS, PATIENCE = 2**29, 5, 60
"""Address space beyond what is in use at the start, and the processor's time, that a mutant may
take; and the time after which the process is ended, on a busy machine too."""
ENOUGH_BYTES = 2**22


def mutants(data: bytes, seed: int, n: int) -> Iterator[bytes]:
    """`data` damaged in n ways: flipped, cut, lengthened, and with numbers at their extremes."""
    for i in range(n):
        yield mutant(data, np.random.default_rng((seed, i)))


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` damaged in one to three ways."""
    for _ in range(rng.integers(1, 4)):
        change = DAMAGES[rng.integers(len(DAMAGES))]
        data = change(bytearray(data), rng) if data else b"\0"
    return bytes(data)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    """Anywhere, or near the beginning where the sizes are."""
    return int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 1024)))


def _flip(data: bytearray, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 9)):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _replace(data: bytearray, rng: np.random.Generator) -> bytes:
    data[_place(data, rng)] = int(rng.integers(256))
    return bytes(data)


def _cut(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: int(rng.integers(len(data)))])


def _remove(data: bytearray, rng: np.random.Generator) -> bytes:
    start = _place(data, rng)
    del data[start : start + int(rng.integers(1, 64))]
    return bytes(data)


def _insert(data: bytearray, rng: np.random.Generator) -> bytes:
    start = _place(data, rng)
    data[start:start] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(data)


def _repeat(data: bytearray, rng: np.random.Generator) -> bytes:
    start, to = _place(data, rng), _place(data, rng)
    part = data[start : start + int(rng.integers(1, 256))]
    data[to : to + len(part)] = part
    return bytes(data)


def _extreme(data: bytearray, rng: np.random.Generator) -> bytes:
    """A number of 1, 2, 4 or 8 bytes becomes one that programs stumble over."""
    width = 1 << int(rng.integers(4))
    start = _place(data, rng) // width * width
    top = 1 << (8 * width - 1)
    number = [0, 1, top - 1, top, 2 * top - 1, 2 * top - 2, top >> 3][rng.integers(7)]
    data[start : start + width] = number.to_bytes(width, "little" if rng.random() < 0.5 else "big")
    return bytes(data)


def _text(data: bytearray, rng: np.random.Generator) -> bytes:
    """A number written out becomes another."""
    found = list(re.finditer(rb"\d+", bytes(data[:4096])))
    if not found:
        return _extreme(data, rng)
    spot = found[rng.integers(len(found))]
    others = [b"0", b"-1", b"1", b"7", b"4294967296", b"9" * 20, b"1e400", b"nan", b"", b"0x10"]
    new = others[rng.integers(len(others))]
    if rng.random() < 0.5:
        new = new[: len(spot[0])].rjust(len(spot[0]), b"0")
    data[spot.start() : spot.end()] = new
    return bytes(data)


DAMAGES = (_flip, _replace, _cut, _remove, _insert, _repeat, _extreme, _text)


def outcome(path: pathlib.Path, hints: dict[str, Any]) -> str:
    """What becomes of reading a file: "refused" or "read"; other exceptions are passed on."""
    try:
        source = read(path, **hints)
        frame = int(np.prod(source.frame_shape, dtype=object))
        assert min(*source.scan_shape, *source.frame_shape) > 0
        if source.kind == "dense" and frame * source.dtype.itemsize > ENOUGH_BYTES:
            return "too large to read"
        some = np.arange(len(source) if len(source) < 10**6 else 10**6)
        some = some[: max(1, ENOUGH_BYTES // (frame * source.dtype.itemsize))]
        data: Any = source.load(some) if source.kind == "dense" else source.host(some)
    except InputError as error:
        assert str(path.parent) in str(error), f"the message names no file: {error}"
        return "refused"
    if source.kind == "dense":
        assert data.shape == (len(some), *source.frame_shape)
        assert data.dtype == source.dtype.newbyteorder("=")
    else:
        assert (len(data), data.shape) == (len(some), source.frame_shape)
        indptr, pixels = np.asarray(data.indptr), np.asarray(data.pixels)
        assert indptr[0] == 0 and indptr[-1] == len(pixels) and (np.diff(indptr) >= 0).all()
        assert not len(pixels) or (pixels.min() >= 0 and pixels.max() < frame)
    return "read"


def survive(work: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read mutants of one format one after the other, and tell what became of each."""
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "whole").mkdir()
        path, hints = EXAMPLES[work["format"]](folder / "whole")
        assert outcome(path, hints) == "read"
        parts = sorted(p for p in (folder / "whole").rglob("*") if p.is_file())
        damaged = pathlib.Path(shutil.copytree(folder / "whole", folder / "damaged"))
        _limit_memory()
        signal.signal(signal.SIGPROF, _too_long)
        for i in range(work["first"], work["first"] + work["count"]):
            rng = np.random.default_rng((work["seed"], i))
            part = parts[rng.integers(len(parts))].relative_to(folder / "whole")
            data = (folder / "whole" / part).read_bytes()
            # Under a new name, as what is known of a file is kept as long as it seems the same.
            damaged = damaged.rename(folder / str(i))
            (damaged / part).write_bytes(mutant(data, rng))
            yield {"began": i}
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            # A loop inside a library in C is left by no signal: the process ends and says where.
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            try:
                result = outcome(damaged / path.relative_to(folder / "whole"), hints)
            except BaseException:
                result = traceback.format_exc()
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            yield {"mutant": i, "file": str(part), "result": result}
            (damaged / part).write_bytes(data)


def _limit_memory() -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, resource.RLIM_INFINITY))


def _too_long(*_) -> None:
    raise TimeoutError(f"not done after {SECONDS} seconds of work")


def run(formats: list[str], count: int, seed: int = 0) -> dict[str, list[str]]:
    """Results of `count` mutants of each format, read in a process apart, or how it ended."""
    results: dict[str, list[str]] = {name: [] for name in formats}
    todo = [{"format": n, "seed": seed, "first": 0, "count": count} for n in formats]
    while todo:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzzing", json.dumps(todo)]
        limit = 2 * PATIENCE + sum(work["count"] for work in todo)
        home = pathlib.Path(__file__).parents[1]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=home)
        began: int | None = None
        for line in map(json.loads, answer.stdout.splitlines()):
            work = todo[0]
            if "began" in line:
                began = line["began"]
            elif "mutant" in line:
                began = None
                results[work["format"]].append(line["result"])
            else:
                del todo[0]
        if todo:
            if began is None:
                raise RuntimeError(
                    f"the process of {todo[0]} ended with {answer.returncode}:\n{answer.stderr}"
                )
            work, done = todo[0], began + 1 - todo[0]["first"]
            said = f"the process ended with {answer.returncode} at mutant {began}: {answer.stderr}"
            results[work["format"]].append(said)
            todo[0] = {**work, "first": began + 1, "count": work["count"] - done}
    return results


def main() -> None:
    """Read what the parent asks for, a line for each event."""
    for work in json.loads(sys.argv[1]):
        for event in survive(work):
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()
        sys.stdout.write("{}\n")


if __name__ == "__main__":
    main()
