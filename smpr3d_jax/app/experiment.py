"""The experiment file: read, asked, changed, written.

`load` refuses a file with one `ExperimentError` that lists every problem as
`FILE:LINE: key = value: what is wrong`, with the nearest valid key where a key is unknown. A value
remembers its line, so that later stages can point to it (`where`).
"""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, Literal

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ..inverse.sampling import default_depth_range, depth_unit, round_below
from .problems import line_numbers, location, parts, problem
from .schema import Experiment, Record


class ExperimentError(ValueError):
    """An experiment that cannot be run; the message names every problem and where it is."""


def load(path: str | Path) -> Experiment:
    """Read an experiment file; data files are looked for beside it and must exist.

    **Raises:** ExperimentError with one line a problem.
    """
    path = Path(path)
    try:
        tree = YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such experiment file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: cannot be read as an experiment file: {error}") from error
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        what = " ".join(str(error.problem or error.context).split())
        raise ExperimentError(f"{path}{line}: not valid YAML: {what}") from error
    except YAMLError as error:
        raise ExperimentError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, CommentedMap):
        what = "is empty" if tree is None else f"holds {type(tree).__name__}, not keys with values"
        raise ExperimentError(f"{path}: {what}; it needs at least beam, scans and geometry")
    return from_mapping(tree, source=str(path), folder=path.parent)


def from_mapping(
    content: Mapping[str, Any], source: str = "experiment", folder: Path | None = None
) -> Experiment:
    """An experiment from nested dictionaries with the keys of the file.

    `source` is what messages call it; with `folder`, the data files must exist there.
    """
    return _validated(_plain(content), source, dict(line_numbers(content)), folder)


def override(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with other values, by key: `{"method.iterations": 5}`; checked again."""
    content = experiment.model_dump(exclude_unset=True)
    for key, value in values.items():
        *path, last = parts(key)
        node: Any = content
        for part in path:
            if isinstance(part, str) and node.get(part) is None:
                node[part] = {}
            node = node[part]
        node[last] = value
    return _validated(content, experiment._source, experiment._lines, None)


def where(experiment: Experiment, key: str) -> str:
    """`FILE:LINE: key` for messages about a key such as `geometry.scan_step`."""
    return location(experiment._source, experiment._lines, parts(key))


def require_available(experiment: Experiment) -> None:
    """Refuse what cannot go together.

    **Raises:** ExperimentError naming the key.
    """
    method, wanted = experiment.method.name, experiment.object
    if method == "singleslice" and (wanted.slices or 1) > 1:
        place = where(experiment, "object.slices")
        raise ExperimentError(
            f"{place} = {wanted.slices}: singleslice has one; write multislice, or leave it out"
        )
    if method != "smatrix" and experiment.structure is not None:
        place = where(experiment, "structure")
        raise ExperimentError(f"{place}: slices are a structure already; leave it out")
    if method == "smatrix" and wanted != type(wanted)():
        place = where(experiment, "object")
        raise ExperimentError(f"{place}: belongs to multislice and singleslice, not to smatrix")


def depth_range(experiment: Experiment) -> tuple[float, float]:
    """Depths (Å) between which the specimen lies: as given, or the sections', or from the foci."""
    if experiment.method.depth_range is not None:
        return experiment.method.depth_range
    shown = experiment.sections
    if shown.start is not None and shown.stop is not None and shown.start < shown.stop:
        return shown.start, shown.stop
    defoci = [scan.defocus or 0.0 for scan in experiment.scans]
    return default_depth_range(*_optics(experiment), defoci)


def section_depths(experiment: Experiment) -> Float[np.ndarray, " depths"]:
    """Depth (Å) of every section: from `start` to `stop`, both included when `step` divides them.

    Defaults: the depth range, in steps of a round number below a tenth of lambda/alpha².
    """
    shown, (low, high) = experiment.sections, depth_range(experiment)
    step = shown.step or round_below(depth_unit(*_optics(experiment)) / 10)
    start = step * np.floor(low / step) if shown.start is None else shown.start
    stop = step * np.ceil(high / step) if shown.stop is None else shown.stop
    return start + step * np.arange(max(0, int(np.floor((stop - start) / step + 1e-6))) + 1)


def _optics(experiment: Experiment) -> tuple[float, float]:
    semiangle, energy = experiment.beam.semiangle_mrad, experiment.beam.energy_ev
    if semiangle is None or energy is None:
        raise ExperimentError(
            f"{where(experiment, 'beam')}: energy_ev and semiangle_mrad must be known first"
        )
    return semiangle, energy


def _validated(
    content: dict[str, Any], source: str, lines: dict[str, int], folder: Path | None
) -> Experiment:
    context = {"accept_implausible": content.get("accept_implausible") is True, "folder": folder}
    try:
        experiment = Experiment.model_validate(content, context=context)
    except ValidationError as error:
        found = [problem(e, source, lines, content) for e in error.errors(include_url=False)]
        found.sort(key=lambda entry: entry[0])
        raise ExperimentError("\n".join(dict.fromkeys(text for _, text in found))) from None
    experiment._source, experiment._lines = source, lines
    return experiment


def _plain(node: Any) -> Any:
    """The tree without ruamel's types; keys are text."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


# --- writing -------------------------------------------------------------------------------------


def to_yaml(experiment: Experiment, comments: bool = False, folder: Path | None = None) -> str:
    """The whole experiment, defaults included, as the text of an experiment file.

    `comments` puts beside each key what it is; file names are written relative to `folder`.
    """
    text = io.StringIO()
    writer = YAML()
    writer.width = 1000  # comments must stay on their line
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.dump(_tree(experiment, comments, folder), text)
    return text.getvalue()


def template() -> str:
    """An experiment file to fill in: a focal series of two, every key with what it is."""
    example = {
        "title": "two nanotubes",
        "beam": {"energy_ev": 80000, "semiangle_mrad": 25, "aberrations": {"C12": 0, "phi12": 0}},
        "scans": [
            {"file": "scan_0.h5", "defocus": -150},
            {"file": "scan_1.h5", "defocus": 250},
        ],
        "geometry": {"scan_step": 0.4, "detector_pixel_mrad": 1.74},
    }
    head = "# An experiment of smpr3d. Everything below `geometry` has defaults that work.\n"
    return head + to_yaml(from_mapping(example), comments=True)


def _tree(record: Record, comments: bool, folder: Path | None) -> CommentedMap:
    """The record as ruamel wants it."""
    tree = CommentedMap()
    for name, field in type(record).model_fields.items():
        value = getattr(record, name)
        if isinstance(value, Record):
            tree[name] = _tree(value, comments, folder)
        elif isinstance(value, tuple) and value and isinstance(value[0], Record):
            # the keys of a list's entries are explained once
            tree[name] = [_tree(v, comments and i == 0, folder) for i, v in enumerate(value)]
        else:
            tree[name] = _leaf(value, folder)
        if comments:
            choices = ": " + " | ".join(get_args(field.annotation)) if _is_choice(field) else ""
            tree.yaml_add_eol_comment(f"{field.description}{choices}", name, column=36)
    return tree


def _is_choice(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal


def _leaf(value: Any, folder: Path | None) -> Any:
    """Whole numbers without a point, pairs and dictionaries on one line."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, tuple):
        row = CommentedSeq([_leaf(v, folder) for v in value])
        row.fa.set_flow_style()
        return row
    if isinstance(value, dict):
        row = CommentedMap({k: _leaf(v, folder) for k, v in value.items()})
        row.fa.set_flow_style()
        return row
    if isinstance(value, Path):
        return Path(os.path.relpath(value, folder) if folder else value).as_posix()
    return value
