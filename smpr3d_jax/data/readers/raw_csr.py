"""Compressed sparse rows in plain binary files beside a TOML file: LiberTEM's raw_csr.

    [params]
    filetype = "raw_csr"
    nav_shape = [256, 256]
    sig_shape = [576, 576]

    [raw_csr]
    indptr_file = "scan.csr_indptr"
    indptr_dtype = "<i8"
    ...

and so on for `indices` (flat detector indices) and `data` (electrons of each). The files are mapped
into memory. What we know of the experiment is in a table [facts] of our own, which LiberTEM passes
over. (https://libertem.github.io/LiberTEM, "Raw CSR")
"""

import contextlib
import json
import math
import os
import pathlib
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Integer, Shaped

from ..counts import InputError
from ..events import EventRows, merge, rows_of
from .source import kept_facts, layout, Load, numeric, Positions, Source


PARTS = "indptr", "indices", "data"
# A description is short; longer files are not searched for it.
LONGEST = 2**20
ENTRY_BYTES = 24


def recognises(path: pathlib.Path) -> bool:
    """Whether the file is a short text that names this format."""
    if path.stat().st_size > LONGEST:
        return False
    text = path.read_bytes()
    return b"raw_csr" in text.lower() and b"\0" not in text


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
) -> Source:
    """Describe the events that a TOML file names; hints must agree with it.

    **Raises:** InputError if a part is missing, or the files do not fit together.
    """
    if dataset is not None:
        raise InputError(f"{path}: has no datasets to choose from; leave out dataset={dataset!r}.")
    said, parts = _described(path)
    params = said["params"]
    shape = (*_sizes(path, params, "nav_shape"), *_sizes(path, params, "sig_shape"))
    if len(shape) < 3 or len(_sizes(path, params, "sig_shape")) != 2:
        raise InputError(
            f"{path}: sig_shape = {params['sig_shape']} is no frame; two sizes (rows, columns) are "
            "needed."
        )
    if len(shape) > 4:
        shape = (math.prod(shape[:-2]), *shape[-2:])
    scan, frame = layout(str(path), shape, scan_shape, frame_shape)
    indptr, indices, data = (_mapped(path, parts, name) for name in PARTS)
    _check(path, indptr, indices, data, math.prod(scan))
    limits = np.asarray(indptr).astype(np.int64)
    table = said.get("facts")
    facts = kept_facts(table if isinstance(table, dict) else {})
    memory = 8 + ENTRY_BYTES * len(indices) / math.prod(scan)
    load = _loader(path, limits, indices, data, frame)
    return Source(
        path, "raw_csr", "raw_csr", scan, frame, data.dtype, "events", load, facts,
        frame_bytes=memory,
    )  # fmt: skip


def _described(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole description, and the table that names the files."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: is not valid TOML ({error}); correct it.") from error
    params = said.get("params")
    kind = params.get("filetype") if isinstance(params, dict) else None
    parts = said.get(kind) if isinstance(kind, str) else None
    if not isinstance(kind, str) or kind.lower() != "raw_csr" or not isinstance(parts, dict):
        raise InputError(
            f'{path}: needs a table [params] with filetype = "raw_csr" and a table [raw_csr] that '
            "names the files; correct it."
        )
    return said, parts


def _sizes(path: pathlib.Path, params: dict[str, Any], name: str) -> tuple[int, ...]:
    sizes = params.get(name)
    whole = isinstance(sizes, list) and all(type(n) is int and n > 0 for n in sizes)
    if not whole or not sizes:
        raise InputError(
            f"{path}: {name} = {sizes!r} in [params] must be a list of whole numbers above 0, such "
            "as [256, 256]."
        )
    return tuple(sizes)


def _mapped(path: pathlib.Path, parts: dict[str, Any], name: str) -> Shaped[np.ndarray, " _"]:
    """One of the three binary files."""
    file, kind = parts.get(f"{name}_file"), parts.get(f"{name}_dtype")
    if not isinstance(file, str) or not isinstance(kind, str):
        raise InputError(
            f"{path}: [raw_csr] needs {name}_file and {name}_dtype, two texts such as "
            f'"scan.csr_{name}" and "<i4".'
        )
    beside = path.parent / file
    if "\0" in file or not beside.is_file():
        raise InputError(f"{path}: {name}_file = {file!r} is not there; copy it beside {path}.")
    try:
        dtype = numeric(f"{path}: {name}_dtype = {kind!r}", np.dtype(kind))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f'{path}: {name}_dtype = {kind!r} is no type of numbers; write one such as "<i4".'
        ) from error
    size = beside.stat().st_size
    if size % dtype.itemsize or (dtype.kind not in "iu" and name != "data"):
        raise InputError(
            f"{path}: {file!r} has {size} bytes, which are not numbers of the type {kind!r}; it is "
            f"cut short, or {name}_dtype is wrong."
        )
    if not size:
        return np.zeros(0, dtype)
    return np.memmap(beside, dtype, "r")


def _check(path: pathlib.Path, indptr, indices, data, frames: int) -> None:
    if len(indptr) != frames + 1 or len(indices) != len(data):
        raise InputError(
            f"{path}: the scan has {frames} frames, so that `indptr` needs {frames + 1} numbers, "
            f"and has {len(indptr)}; `indices` and `data` need equally many, and have "
            f"{len(indices)} and {len(data)}. Correct nav_shape and the types, or copy the files "
            "again."
        )
    if indptr[0] != 0 or indptr[-1] != len(indices) or np.any(indptr[1:] < indptr[:-1]):
        raise InputError(
            f"{path}: the numbers of `indptr` must rise from 0 to {len(indices)}, the number of "
            f"`indices`; they begin with {indptr[0]} and end with {indptr[-1]}. Copy the files "
            "again, or correct indptr_dtype."
        )


def _loader(
    path: pathlib.Path,
    limits: Int[np.ndarray, " frames_and_one"],
    indices: Integer[np.ndarray, " events"],
    data: Shaped[np.ndarray, " events"],
    frame: tuple[int, int],
) -> Load:
    """How to load the events of some positions."""

    def load(positions: Positions) -> EventRows:
        rows, entries = rows_of(limits, positions)
        pixels, number = (_native(part[entries]) for part in (indices, data))
        try:
            return EventRows(rows, pixels, frame, _electrons(number))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    return load


def _native(part: Shaped[np.ndarray, " events"]) -> Shaped[np.ndarray, " events"]:
    """A part of a map as an array in memory, in the machine's order of bytes."""
    return np.array(part, part.dtype.newbyteorder("="))


def _electrons(number: Shaped[np.ndarray, " events"]) -> Integer[np.ndarray, " events"] | None:
    """Multiplicities, None if each entry is one electron."""
    if np.all(number == 1):
        return None
    good = number >= 0
    if number.dtype.kind == "f":
        good &= (number == np.floor(number)) & (number < 2**53)
    if not good.all():
        raise InputError(
            f"`data` holds {number[~good][0]}, which is no number of electrons; divide by what one "
            "electron counts, or threshold the frames."
        )
    return number.astype({"b": np.uint8, "f": np.int64}.get(number.dtype.kind, number.dtype))


def write_raw_csr(
    path: str | os.PathLike,
    rows: EventRows,
    scan_shape: tuple[int, int],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the events of one scan; `path` is that of the TOML file, three others appear beside it.

    `facts` are those of a `Source`.

    **Raises:** InputError unless there are as many rows as positions.
    """
    if len(rows) != math.prod(scan_shape):
        raise InputError(
            f"{path}: a {scan_shape[0]} × {scan_shape[1]} scan needs {math.prod(scan_shape)} rows "
            f"of events, got {len(rows)}."
        )
    with writing(path, scan_shape, rows.shape, facts) as append:
        append(rows)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike,
    scan_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Callable[[EventRows], None]]:
    """Write a scan in parts: gives a function that takes the rows of the next positions.

    The files take their names when they are complete, the TOML file last.
    """
    path, mark = pathlib.Path(path), uuid.uuid4().hex
    names = {part: f"{path.stem}.csr_{part}" for part in PARTS}
    unfinished = {p: path.with_name(f".{n}.{mark}.part") for p, n in names.items()}
    kinds = {"indptr": "<i8", "indices": "<i4", "data": "|u1"}
    described = path.with_name(f".{path.name}.{mark}.part")
    try:
        with contextlib.ExitStack() as stack:
            files = {p: stack.enter_context(open(f, "w+b")) for p, f in unfinished.items()}
            files["indptr"].write(bytes(8))
            done = 0

            def append(rows: EventRows) -> None:
                nonlocal done
                rows = merge(rows)
                number = np.asarray(rows.multiplicity)
                wanted = np.result_type(number.dtype, np.dtype(kinds["data"]))
                if wanted != np.dtype(kinds["data"]):
                    _widen(files["data"], np.dtype(kinds["data"]), wanted)
                    kinds["data"] = wanted.newbyteorder("<").str
                for name, part in (
                    ("indptr", rows.indptr[1:] + done), ("indices", rows.pixels), ("data", number)
                ):  # fmt: skip
                    files[name].write(np.asarray(part).astype(kinds[name]).tobytes())
                done += len(number)

            yield append
        text = _toml(scan_shape, frame_shape, names, kinds, kept_facts(facts or {}))
        described.write_text(text, encoding="utf-8")
        path.unlink(missing_ok=True)
        for part, file in unfinished.items():
            os.replace(file, path.with_name(names[part]))
        os.replace(described, path)
    finally:
        for file in (*unfinished.values(), described):
            file.unlink(missing_ok=True)


def _widen(file: BinaryIO, before: np.dtype, after: np.dtype) -> None:
    """Numbers already written, in a wider type, from the last to the first."""
    step, number = 2**20, file.tell() // before.itemsize
    for start in reversed(range(0, number, step)):
        file.seek(start * before.itemsize)
        some = np.frombuffer(file.read(min(step, number - start) * before.itemsize), before)
        file.seek(start * after.itemsize)
        file.write(some.astype(after.newbyteorder("<")).tobytes())
    file.seek(number * after.itemsize)


def _toml(scan_shape, frame_shape, names, kinds, facts: Mapping[str, Any]) -> str:
    """The description. Numbers, lists and texts of JSON are those of TOML."""
    tables: dict[str, dict[str, Any]] = {
        "params": {"filetype": "raw_csr", "nav_shape": scan_shape, "sig_shape": frame_shape},
        "raw_csr": {
            f"{p}_{what}": of[p] for p in PARTS for what, of in (("file", names), ("dtype", kinds))
        },
        "facts": dict(facts),
    }
    lines = []
    for title, table in tables.items():
        if table:
            lines += [
                f"[{title}]",
                *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in table.items()),
                "",
            ]
    return "\n".join(lines)
