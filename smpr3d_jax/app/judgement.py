"""Files judged by the rules that `run` asks, before there is an experiment file."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data.counts import InputError
from ..data.readers import check_series, Source
from ..inverse.design import Finding
from .experiment import ExperimentError, from_mapping
from .facts import merge_facts, missing
from .schema import Experiment
from .workflow import findings


OPTIONS = {
    "beam.energy_ev": "--energy",
    "beam.semiangle_mrad": "--semiangle",
    "geometry.scan_step": "--scan-step",
    "geometry.detector_pixel_mrad": "--detector-pixel",
}
"""How the command line says what the experiment file calls by these keys."""


class Judgement(NamedTuple):
    """What speaks against a series, what is not known of it (key and unit), and remarks.

    With something `missing`, or where the remarks say why not, nothing was judged.
    """

    findings: tuple[Finding, ...]
    missing: dict[str, str]
    notes: tuple[str, ...]
    judged: bool


def experiment_of(
    sources: Sequence[Source], said: Mapping[str, Any], defocus: Sequence[float] | None = None
) -> Experiment:
    """The experiment that files make with what is said besides, by key: {"beam.energy_ev": 80e3}.

    **Raises:** ExperimentError for values that cannot be meant, ValueError where there is not one
    `defocus` (Å) a file.
    """
    if defocus and len(defocus) != len(sources):
        raise ValueError(
            f"--defocus is given {len(defocus)} times for {len(sources)} files; give it once for "
            "each, in the order of the files."
        )
    content: dict[str, Any] = {"scans": [{"file": str(source.path)} for source in sources]}
    for scan, value in zip(content["scans"], defocus or (), strict=False):
        scan["defocus"] = value
    for key, value in said.items():
        section, name = key.split(".")
        content.setdefault(section, {})[name] = value
    return from_mapping(content, "info")


def judge(
    experiment: Experiment, sources: Sequence[Source], electrons: Sequence[float]
) -> Judgement:
    """What `run` would say of a series; `electrons` are those of a mean frame of each scan."""
    try:
        notes = check_series(sources)
        merged, said = merge_facts(experiment, [source.facts for source in sources], partial=True)
    except (ExperimentError, InputError) as error:
        return Judgement((), {}, (f"cannot be judged: {error}",), False)
    absent = missing(merged)
    if absent:
        return Judgement((), absent, tuple(notes), False)
    return Judgement(tuple(findings(merged, sources, electrons)), {}, (*notes, *said), True)


def words(judgement: Judgement) -> list[str]:
    """The judgement line by line."""
    lines = [f"note: {note}" for note in judgement.notes]
    if judgement.missing:
        wanted = [
            f"{key} ({OPTIONS.get(key, '--defocus')} in {what})"
            for key, what in judgement.missing.items()
        ]
        lines.append(f"not judged, since the files do not say: {'; '.join(wanted)}")
    lines += [f"{f.severity}: {f.key}: {f.message}" for f in judgement.findings]
    if judgement.judged and not judgement.findings:
        lines.append("nothing speaks against reconstructing this series in tilt modes")
    return lines
