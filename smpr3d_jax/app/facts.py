"""What the data files say about the experiment, weighed against what the experiment says.

A fact is a number that a reader found in a file, in the units of `FACTS`. What was written into the
experiment file wins, a default does not; every difference and every number taken is told.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..physics.optics import wavelength
from .experiment import ExperimentError, override, where
from .problems import all_fields, parts, show
from .schema import Experiment


class _Fact(NamedTuple):
    """What a file may say: its key in the experiment, and the difference that does not matter."""

    key: str
    unit: str
    slack: float = 0.0


FACTS: dict[str, _Fact] = {
    "energy_ev": _Fact("beam.energy_ev", "eV"),
    "semiangle_mrad": _Fact("beam.semiangle_mrad", "mrad"),
    "scan_step_A": _Fact("geometry.scan_step", "Å"),
    "detector_pixel_mrad": _Fact("geometry.detector_pixel_mrad", "mrad"),
    "center": _Fact("geometry.center", "pixels", 0.5),
    "rotation_deg": _Fact("geometry.rotation_deg", "degrees", 0.5),
    "transpose": _Fact("geometry.transpose", ""),
    "defocus_A": _Fact("scans[{}].defocus", "Å", 1.0),
}
"""Facts that `merge_facts` understands; a key with {} belongs to each scan by itself."""

REQUIRED = {
    "beam.energy_ev": "eV, such as 80000",
    "beam.semiangle_mrad": "mrad, such as 25",
    "geometry.scan_step": "Å, such as 0.4",
    "geometry.detector_pixel_mrad": "mrad, such as 1.74",
}


def merge_facts(
    experiment: Experiment, facts: Sequence[Mapping[str, Any]], partial: bool = False
) -> tuple[Experiment, list[str]]:
    """Complete the experiment by what each scan's file says; the experiment wins.

    `facts` has one mapping a scan, as `Source.facts` of a reader: keys of `FACTS`, or the detector
    pixel in 1/Å and the semi-angle in pixels. None and other keys are passed over. The notes say
    what was taken from a file, and where file and experiment differ by more than 1 %. `partial`:
    what is still missing (see `missing`) may be so.

    **Raises:** ExperimentError where files contradict each other or a number is still missing.
    """
    if len(facts) != len(experiment.scans):
        raise ValueError(f"{len(facts)} sets of facts for {len(experiment.scans)} scans")
    known = [_in_our_units(experiment, f) for f in facts]
    found: dict[str, Any] = {}
    notes, problems = [], []
    for name, fact in FACTS.items():
        said = [(i, f[name]) for i, f in enumerate(known) if name in f]
        groups = [[entry] for entry in said] if "{}" in fact.key else [said] if said else []
        for group in groups:
            key = fact.key.format(group[0][0])
            _weigh(experiment, key, fact, group, found, notes, problems)
    if problems:
        raise ExperimentError("\n".join(problems))
    try:
        merged = override(experiment, found) if found else experiment
    except ExperimentError as error:
        raise ExperimentError(f"{error}\n(as the data files say: {found})") from None
    if not partial:
        _require(merged)
    return merged, notes


def _in_our_units(experiment: Experiment, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as plain numbers with the units of `FACTS`, as far as they are known."""
    names = {*FACTS, "detector_pixel_inv_A", "semiangle_pixels"}
    known = {n: _value(fact) for n, fact in facts.items() if n in names and fact is not None}
    energy = experiment.beam.energy_ev or known.get("energy_ev")
    if energy and "detector_pixel_inv_A" in known:
        angle = np.multiply(known["detector_pixel_inv_A"], wavelength(float(energy)) * 1e3)
        known.setdefault("detector_pixel_mrad", _value(angle))
    pixel = known.get("detector_pixel_mrad")
    if isinstance(pixel, tuple) and _same(pixel[0], pixel[1], 0.0):
        known["detector_pixel_mrad"] = pixel[0]
    pixel = experiment.geometry.detector_pixel_mrad or known.get("detector_pixel_mrad")
    if isinstance(pixel, float) and "semiangle_pixels" in known:
        known.setdefault("semiangle_mrad", pixel * known["semiangle_pixels"])
    return known


def _weigh(
    experiment: Experiment,
    key: str,
    fact: _Fact,
    said: list[tuple[int, Any]],
    found: dict[str, Any],
    notes: list[str],
    problems: list[str],
) -> None:
    """Compare what was written with what the files say, or take the files' value."""
    written, files = _given(experiment, key), _names(experiment, [i for i, _ in said])
    if written is not None:
        other = [(i, value) for i, value in said if not _same(written, value, fact.slack)]
        if other:
            notes.append(
                f"{where(experiment, key)} = {show(written)} {fact.unit}".rstrip()
                + f" is used, not {show(other[0][1])} as in "
                f"{_names(experiment, [i for i, _ in other])}"
            )
        return
    value = said[0][1]
    odd = next(((i, v) for i, v in said if not _same(value, v, fact.slack)), None)
    if odd:
        first, second = (_names(experiment, [i]) for i in (said[0][0], odd[0]))
        problems.append(
            f"{where(experiment, key)}: the data files disagree: {first} says {show(value)}, "
            f"{second} says {show(odd[1])}; write the right value into the experiment file"
        )
    if key == "geometry.detector_pixel_mrad" and isinstance(value, tuple):
        problems.append(
            f"{where(experiment, key)}: the detector pixels in {files} are not square, "
            f"{show(value)} mrad; resample the frames, or write one number into the experiment file"
        )
    found[key] = value
    if not _same(value, _default(key), 0.0):  # to take what would be assumed anyway is no news
        notes.append(f"{key} = {show(value)} {fact.unit}".rstrip() + f" is taken from {files}")


def missing(experiment: Experiment) -> dict[str, str]:
    """Keys without which nothing can be reconstructed and that nobody wrote, and what they are."""
    wanted = dict(REQUIRED)
    for i, _ in enumerate(experiment.scans):
        wanted[f"scans[{i}].defocus"] = "Å, 0 if in focus"
    return {key: what for key, what in wanted.items() if _given(experiment, key) is None}


def _require(experiment: Experiment) -> None:
    """Everything that must be known by now."""
    if absent := missing(experiment):
        raise ExperimentError(
            "\n".join(
                f"{where(experiment, key)}: missing, and the data files do not say; add "
                f"`{parts(key)[-1]}` ({what})"
                for key, what in absent.items()
            )
        )


def _given(experiment: Experiment, key: str) -> Any:
    """The value of a key if somebody wrote it, else None (a default is not an opinion)."""
    node: Any = experiment
    for part in parts(key):
        if isinstance(part, str):
            if part not in node.model_fields_set:
                return None
            node = getattr(node, part)
        else:
            node = node[part]
    return node


def _default(key: str) -> Any:
    field = next(f for k, f in all_fields(Experiment) if k == re.sub(r"\[\d+\]", "", key))
    return field.default


def _value(fact: Any) -> Any:
    """Numbers and pairs as plain Python, whatever the reader gave."""
    if isinstance(fact, bool | np.bool_):
        return bool(fact)
    values = tuple(float(v) for v in np.ravel(fact))
    return values[0] if len(values) == 1 else values


def _same(written: Any, said: Any, slack: float) -> bool:
    """Within 1 %, or within the slack."""
    if said is None or isinstance(written, bool):
        return written == said
    a, b = np.broadcast_arrays(np.asarray(written, float), np.asarray(said, float))
    return bool(np.all(np.abs(a - b) <= np.maximum(0.01 * np.abs(a), slack)))


def _names(experiment: Experiment, scans: list[int]) -> str:
    return ", ".join(experiment.scans[i].file.name for i in scans)
