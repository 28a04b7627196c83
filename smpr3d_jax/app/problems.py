"""What is wrong with an experiment file, and where: `FILE:LINE: key = value: what is wrong`.

A key path is the way to a value, `("scans", 0, "defocus")`, written `scans[0].defocus`; the lines
are a dictionary from the written path to the line in the file, from 1. Pydantic finds the errors;
here they are put in the words of the file, with the nearest valid key or value.
"""

import re
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from .schema import Experiment, nearest, Record


KeyPath = tuple[str | int, ...]


def problem(
    error: ErrorDetails, source: str, lines: dict[str, int], content: Any
) -> tuple[int, str]:
    """(line, message) of one error of pydantic."""
    path = tuple(part for part in error["loc"] if part != "[key]")
    if key := error.get("ctx", {}).get("key"):
        path = path + parts(key)
    value = content
    for depth, part in enumerate(path):
        if isinstance(value, dict | list | tuple) and not _holds(value, part):
            break  # a missing key keeps its whole path
        if not isinstance(value, dict | list | tuple):
            path = path[:depth]  # one number that stands for a pair
            break
        value = value[part]  # type: ignore[call-overload]
    shown = "" if error["type"] == "missing" or not path else f" = {show(value)}"
    place = location(source, lines, path)
    return _line(lines, path), f"{place}{shown}: {_complaint(error, path)}"


def _holds(node: Any, part: str | int) -> bool:
    return part in node if isinstance(node, dict) else isinstance(part, int) and part < len(node)


def _complaint(error: ErrorDetails, path: KeyPath) -> str:
    """What is wrong, in the words of the file and not of Python."""
    match error["type"]:
        case "extra_forbidden":
            return _unknown(path)
        case "missing":
            record = _record_at(path[:-1])
            field = record.model_fields.get(str(path[-1])) if record else None
            return "missing" + (f": {field.description}" if field else ": two numbers, [y, x]")
        case "literal_error":
            choices = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
            close = nearest(error["input"], choices)
            hint = f"; nearest valid value {close!r}" if close else ""
            return f"must be one of {', '.join(choices)}{hint}"
        case "model_type" | "dict_type":
            record = _record_at(path)
            keys = f": {', '.join(record.model_fields)}" if record else ""
            return f"must hold keys with values{keys}"
        case "path_type":
            return "must be a file name"
        case "bool_type":
            return "must be true or false"
        case "float_type":
            return "must be a number"
        case "int_type":
            return "must be a whole number"
        case "tuple_type":
            return "must be a list, [first, second]" if path != ("scans",) else "must be a list"
    message = error["msg"].replace("Input should be a valid", "must be a")
    message = message.replace("Input should", "must").replace(" after validation", "")
    return message.replace("Tuple should", "must")


def _unknown(path: KeyPath) -> str:
    """The nearest key here, or the place where this key belongs."""
    record, key = _record_at(path[:-1]), str(path[-1])
    valid = list(record.model_fields) if record else []
    keys = [place for place, _ in all_fields(Experiment)]
    elsewhere = [place for place in keys if place.split(".")[-1] == key]
    if elsewhere:
        return f"unknown key here; nearest valid key {elsewhere[0]!r}"
    close = nearest(key, valid) or next((p for p in keys if nearest(key, [p.split(".")[-1]])), None)
    hint = f"nearest valid key {close!r}" if close else f"valid keys are {', '.join(valid)}"
    return f"unknown key; {hint}"


def _record_at(path: KeyPath) -> type[Record] | None:
    """The section that a path leads to."""
    record: type[Record] | None = Experiment
    for part in path:
        if isinstance(part, int):
            continue
        field = record.model_fields.get(part) if record else None
        record = _section(field.annotation) if field else None
    return record


def _section(annotation: Any) -> type[Record] | None:
    """The record inside a type such as `tuple[ScanEntry, ...]` or `Stop | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation
    inner = (_section(part) for part in getattr(annotation, "__args__", ()))
    return next((found for found in inner if found), None)


def all_fields(record: type[Record], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that an experiment may have, and what is known of it."""
    for name, field in record.model_fields.items():
        yield prefix + name, field
        if inner := _section(field.annotation):
            yield from all_fields(inner, f"{prefix}{name}.")


def parts(key: str) -> KeyPath:
    """`scans[0].defocus` -> ("scans", 0, "defocus")."""
    return tuple(int(p) if p.isdigit() else p for p in re.findall(r"[^.\[\]]+", key))


def key_of(path: KeyPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".")


def _line(lines: dict[str, int], path: KeyPath) -> int:
    """The line of the path, or of the section that should hold it; 0 if unknown."""
    places = (lines.get(key_of(path[:n])) for n in range(len(path), 0, -1))
    return next((line for line in places if line), 0)


def location(source: str, lines: dict[str, int], path: KeyPath) -> str:
    line = _line(lines, path) or (1 if lines else 0)
    return ": ".join(filter(None, [f"{source}:{line}" if line else source, key_of(path)]))


def line_numbers(node: Any, path: KeyPath = ()) -> Iterator[tuple[str, int]]:
    """Every key of a tree read by ruamel and the line it stands on, from 1."""
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            if key in (node.lc.data or {}):  # not so for keys merged from an anchor
                yield key_of((*path, str(key))), node.lc.key(key)[0] + 1
            yield from line_numbers(value, (*path, str(key)))
    elif isinstance(node, CommentedSeq):
        for i, value in enumerate(node):
            if place := node.lc.item(i):
                yield key_of((*path, i)), place[0] + 1
            yield from line_numbers(value, (*path, i))


def show(value: Any) -> str:
    """A value as it would stand in the file, shortened."""
    if isinstance(value, tuple | list):
        text = f"[{', '.join(show(v) for v in value)}]"
    elif isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    else:
        text = f"{value:.7g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
