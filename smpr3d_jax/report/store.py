"""What is kept: nested dicts in HDF5, and facts in JSON; a file is complete or it is not there.

A nested dict becomes groups, an array a dataset (complex natively, as h5py writes it), and a fact
(None, bool, number, string, list of these) an attribute of its group. Lists of numbers are stored
as numbers, any other list as text that begins with `json:`. What is loaded equals what was saved:
arrays of the same dtype and shape; tuples come back as lists and NumPy scalars as Python's.
Datasets can carry attributes besides, which `load` leaves aside and `attributes` returns.
"""

import contextlib
import difflib
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np


Path = str | os.PathLike[str]

_JSON = "json:"
_NUMBERS = "biufc"  # NumPy's kinds of bool, integer, real and complex


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """Lend a temporary path beside `path`, which takes its place when the block has succeeded.

    Until then, and if the block raises, a file already at `path` is untouched. Whatever was written
    is flushed to the disk before it is renamed, and removed on failure.

    **Raises:** FileNotFoundError where the folder does not exist, ValueError where `path` is one.
    """
    target = pathlib.Path(os.path.realpath(path))  # a link keeps pointing at the new file
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {target}: its folder {target.parent} does not exist."
        )
    if target.is_dir():
        raise ValueError(f"Cannot write {target}: it is a folder; give the path of a file.")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # only there can a folder be flushed, and with it the renaming
        _flush(target.parent)


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(
    path: Path,
    tree: Mapping[str, Any],
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Keep a nested dict of arrays and facts in an HDF5 file.

    `attributes` adds facts by place: `{"sections/phase": {"units": "rad"}}`; "/" is the file.

    **Raises:** ValueError naming the place of a value that cannot be kept.
    """
    with replacing(path) as temporary, created(temporary) as file:
        write(file, tree, attributes)


def created(path: Path) -> h5py.File:
    """A new HDF5 file whose attributes may exceed 64 kB (readable from HDF5 1.8 on)."""
    return h5py.File(path, "x", libver=("v108", "v110"))


def write(
    group: h5py.Group,
    tree: Mapping[str, Any],
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a nested dict, and `attributes` by place, into an open HDF5 group."""
    for name, value in tree.items():
        place = f"{group.name}/{name}".replace("//", "/")
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{place!r}: a key must be a non-empty string without '/'.")
        if isinstance(value, Mapping):
            write(group.require_group(name), value)
        elif hasattr(value, "__array__") and not isinstance(value, np.generic):
            _write_array(group, name, np.asarray(value), place)
        else:
            group.attrs[name] = _encoded(value, place)
    for place, facts in (attributes or {}).items():
        if place not in group:
            raise ValueError(f"Attributes for {place!r}, but the tree has only {sorted(group)}.")
        for name, value in facts.items():
            group[place].attrs[name] = _encoded(value, f"{place}@{name}")


def _write_array(group: h5py.Group, name: str, array: np.ndarray, place: str) -> None:
    if array.dtype.kind == "U":
        array = array.astype(h5py.string_dtype())
    try:
        group.create_dataset(name, data=array)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: an array of {array.dtype} cannot be kept in HDF5; "
            "numbers, bools and strings can."
        ) from error


def _encoded(value: Any, place: str) -> Any:
    """A fact as HDF5 keeps it: natively where that comes back equal, otherwise as JSON."""
    value = plain(value, place)
    if value is None:
        return h5py.Empty("f4")
    if isinstance(value, bool | float | complex):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, str) and not value.startswith(_JSON) and _is_text(value):
        return value
    if isinstance(value, list) and _are_numbers(value):
        return np.asarray(value)
    try:
        return _JSON + json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{place}: complex numbers in a mixed list; use an array.") from error


def _is_text(value: str) -> bool:
    """Whether HDF5's own strings can hold it: valid UTF-8 without NUL."""
    return "\0" not in value and value == value.encode(errors="ignore").decode()


def _are_numbers(values: list) -> bool:
    """Whether the list is one array of one kind of number, so that nothing changes type."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        return False
    # by repr, since 1 == 1.0 == True, and NaN is not NaN
    return array.dtype.kind in _NUMBERS and array.size > 0 and repr(array.tolist()) == repr(values)


def plain(value: Any, place: str = "value") -> Any:
    """A fact in Python's own types: NumPy and JAX numbers and arrays, tuples and paths undone.

    **Raises:** ValueError naming `place` for anything that is not a fact.
    """
    if value is None or isinstance(value, bool | int | float | complex | str):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{place}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__") and np.asarray(value).dtype.kind in _NUMBERS + "U":
        return np.asarray(value).tolist()
    raise ValueError(
        f"{place}: a value of type {type(value).__name__} cannot be kept; arrays, dicts, numbers, "
        "strings, None and lists of these can."
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file, open for reading; its datasets stay on the disk until they are indexed.

    **Raises:** FileNotFoundError, and ValueError where it is no HDF5 file or not all of it.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is not a complete HDF5 file ({error}); it is of another kind, or its copying "
            "or writing was cut short."
        ) from error
    with file:
        yield file


def load(path: Path, key: str = "/") -> Any:
    """What was saved in a file, or the part of it at `key` ("sections/phase").

    **Raises:** as `opened`, and ValueError for a key that the file does not have.
    """
    parent, _, name = key.strip("/").rpartition("/")
    with opened(path) as file:
        if key not in file and (parent or "/") in file and name in file[parent or "/"].attrs:
            return _decoded(file[parent or "/"].attrs[name])
        node = _node(file, key, path)
        try:
            return _read(node)
        except OSError as error:
            raise ValueError(f"{path}: {key!r} cannot be read ({error}).") from error


def attributes(path: Path, key: str = "/") -> dict[str, Any]:
    """The facts attached to one group or dataset of a file."""
    with opened(path) as file:
        return _facts(_node(file, key, path))


def _node(file: h5py.File, key: str, path: Path) -> Any:
    if key in file:
        return file[key]
    places: list[str] = []
    file.visit(places.append)
    near = difflib.get_close_matches(key.strip("/"), places, 1)
    known = sorted(map(str, [*file, *file.attrs]))
    hint = f"Did you mean {near[0]!r}?" if near else f"It has {known}."
    raise ValueError(f"{path} has no {key!r}. {hint}")


def _read(node: Any) -> Any:
    if isinstance(node, h5py.Dataset):
        # h5py gives strings as objects; they were saved as an array of text
        text = h5py.check_string_dtype(node.dtype) is not None
        return np.asarray(node.asstr()[...], str) if text else np.asarray(node[()])
    return _facts(node) | {name: _read(child) for name, child in node.items()}


def _facts(node: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    return {name: _decoded(value) for name, value in node.attrs.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, str):
        return json.loads(value.removeprefix(_JSON)) if value.startswith(_JSON) else value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def write_json(path: Path, facts: Any) -> None:
    """Write facts as JSON; NaN and infinities, which JSON does not have, become null.

    **Raises:** ValueError naming the place of a value that JSON cannot hold.
    """
    text = json.dumps(_finite(plain(facts)), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, complex):
        raise ValueError(f"JSON has no complex numbers, got {value}; keep real and imaginary part.")
    return None if isinstance(value, float) and not math.isfinite(value) else value
