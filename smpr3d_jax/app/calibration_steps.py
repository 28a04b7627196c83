"""Two questions of `calibrate`: what is an electron worth, and how far apart are the positions?

Each is answered by what the user gives, or the frames say, or the files, and says which.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Num

from ..data.calibration import (
    Charge,
    find_charge,
    ScanStep,
    Signals,
    step_from_lattice,
    whole_electrons,
)
from ..data.counts import InputError
from ..data.readers import Source
from ..data.readers.steps import in_electrons


AGREE = 0.05
"""Part by which files and frames may differ about the counts of an electron."""


class Electrons(NamedTuple):
    """What frames hold: how they look as they are, and what they are divided by, if they are.

    `counts_per_electron` and its `error` (nan if it was given): 1 and 0 of counted frames; of
    unclear ones what the noise says, which they are not divided by.
    """

    charge: Charge
    divided_by: float | None
    counts_per_electron: float
    error: float

    @property
    def sure(self) -> bool:
        """Whether counts are electrons, after the division."""
        return self.divided_by is not None or self.charge.kind == "counted"


def electrons_of(
    sources: Sequence[Source], given: float | None = None, said: float | None = None
) -> tuple[tuple[Source, ...], Electrons, list[str]]:
    """The sources in electrons where that can be, what an electron is worth, and remarks.

    `given` by the user wins; otherwise it is what the frames tell (`find_charge`), and what the
    files have `said` where they do not. Frames that do not come out as whole electrons stay as
    they are.

    **Raises:** InputError for a given number that makes no whole electrons of the frames, and
    where files and frames contradict each other.
    """
    charge = find_charge(sources)
    worth, error = charge.counts_per_electron, charge.error
    if given is not None:
        divided, notes = _as_given(sources, charge, given)
        worth, error = given, math.nan
    else:
        divided, notes = _as_found(sources, charge, said)
        if divided is not None and charge.kind != "integrating":
            worth, error = divided, math.nan
    if divided is not None:
        sources = [in_electrons(source, divided) for source in sources]
    return tuple(sources), Electrons(charge, divided, worth, error), notes


def _as_given(
    sources: Sequence[Source], charge: Charge, given: float
) -> tuple[float | None, list[str]]:
    if not 0 < given < math.inf:
        raise InputError(f"counts per electron are {given:g}; a positive number is needed.")
    if given == 1 and charge.whole:
        return None, []
    if any(source.kind == "events" for source in sources):
        raise InputError(
            f"{given:g} counts per electron cannot be: {sources[0].path} holds single electrons."
        )
    if not whole_electrons(sources, given):
        raise InputError(
            f"{given:g} counts per electron make no whole electrons of the frames in "
            f"{sources[0].path}: {charge.reason}."
        )
    worth, error = charge.counts_per_electron, charge.error
    if charge.kind == "unclear" or abs(given - worth) <= 0.02 * worth + 3 * error:
        return given, []
    return given, [
        f"{given:g} counts per electron were given; the frames look like {worth:.4g}: "
        f"{charge.reason}"
    ]


def _as_found(
    sources: Sequence[Source], charge: Charge, said: float | None
) -> tuple[float | None, list[str]]:
    files = f"the files say {said:.4g} counts per electron" if said is not None else ""
    if charge.kind == "counted":
        odd = said is not None and abs(said - 1) > AGREE
        return None, [f"{files}, but these are {charge.reason}; nothing is divided"] * odd
    if charge.kind == "integrating":
        worth = charge.counts_per_electron
        if said is not None and abs(said - worth) > AGREE * worth:
            raise InputError(
                f"{sources[0].path}: {files}, but {charge.reason}; give the right number "
                "(--counts-per-electron)."
            )
        return worth, []
    if said is not None and said != 1 and whole_electrons(sources, said):
        return said, [f"{files}, which is used; of the frames alone: {charge.reason}"]
    why = f"what an electron is worth is not clear: {charge.reason}. "
    if charge.whole:
        return None, [
            f"{why}Nothing is divided, and doses are in counts; if they are electrons, or you know "
            "better, give --counts-per-electron"
        ]
    return None, [
        f"{why}Poisson statistics need whole electrons, so that the experiment compares amplitudes "
        "(method.loss); if you know better, give --counts-per-electron"
    ]


class Lattice(NamedTuple):
    """The image of a scan in which a lattice is seen best, and the step that follows."""

    scan: int
    image: Num[np.ndarray, "scan_y scan_x"]
    name: str
    found: ScanStep


class Step(NamedTuple):
    """Distances of positions (slow, fast) in Å, standard errors, and the `lattices` behind them."""

    step: tuple[float, float]
    sigma: tuple[float, float]
    lattices: tuple[Lattice, ...]


def step_of(
    signals: Sequence[Signals], spacing: float, nominal: tuple[float, float] | None = None
) -> tuple[Step, list[str]]:
    """The scan step from a lattice `spacing` (Å) in virtual images, the mean of all scans.

    Each scan is represented by that of its images whose peaks are highest; far out of focus there
    may be none. Steps along both axes
    are taken to be equal unless they differ by more than three standard errors. `nominal` says
    which peaks are meant.

    **Raises:** InputError where no scan shows the lattice.
    """
    rough = None if nominal is None else float(np.mean(nominal))
    found: list[Lattice] = []
    refused = InputError("")
    for scan, one in enumerate(signals):
        seen = []
        for name, image in _images(one).items():
            try:
                seen.append(Lattice(scan, image, name, step_from_lattice(image, spacing, rough)))
            except InputError as error:
                refused = error
        found += sorted(seen, key=lambda lattice: -lattice.found.height)[:1]
    if not found:
        raise InputError(
            f"The scan step cannot be measured from a lattice (--lattice): {refused} It is looked "
            f"for in {', '.join(_images(signals[0]))}, which show it near focus."
        )
    weight = np.array([lattice.found.sigma for lattice in found]) ** -2.0
    steps = np.array([lattice.found.step for lattice in found])
    step, sigma = (weight * steps).sum(0) / weight.sum(0), weight.sum(0) ** -0.5
    scatter = np.sqrt(
        (weight * (steps - step) ** 2).sum(0) / weight.sum(0) / max(1, len(found) - 1)
    )
    sigma = np.maximum(sigma, scatter)
    if abs(step[0] - step[1]) < 3 * math.hypot(*sigma):
        both = sigma**-2.0
        step = np.full(2, float((both * step).sum() / both.sum()))
        # Peaks of one direction tell both steps at once, not each of them.
        one = any(not lattice.found.separate for lattice in found)
        sigma = np.full(2, float(sigma.max() if one else both.sum() ** -0.5))
    pair = lambda v: (float(v[0]), float(v[1]))
    answer = Step(pair(step), pair(sigma), tuple(found))
    return answer, _about_step(answer, spacing, nominal)


def _images(one: Signals) -> dict[str, Num[np.ndarray, "scan_y scan_x"]]:
    """Images in which a crystal may be seen; the deflection as y + ix."""
    return {
        "outside the disc": one.dark,
        "bright field": one.images.sum(-1),
        "centre of mass": one.com[..., 0] + 1j * one.com[..., 1],
    }


def _about_step(found: Step, spacing: float, nominal: tuple[float, float] | None) -> list[str]:
    told = f"{found.step[0]:.5g} ± {found.sigma[0]:.2g}"
    if found.step[0] != found.step[1]:
        told += f", {found.step[1]:.5g} ± {found.sigma[1]:.2g}"
    said = f"the lattice of {spacing:g} Å says a scan step of {told} Å"
    notes = []
    if nominal is None:
        notes.append(
            f"{said}, if the strongest peaks of the spectrum are those of this spacing; "
            "--scan-step would say which are"
        )
    else:
        away = max(abs(a - b) / s for a, b, s in zip(found.step, nominal, found.sigma, strict=True))
        known = " × ".join(f"{n:g}" for n in dict.fromkeys(nominal))
        agrees = f"which agrees with the {known} Å given" if away < 3 else (
            f"which is used, not the {known} Å given"
        )  # fmt: skip
        notes.append(f"{said}, {agrees}")
    if all(not lattice.found.separate for lattice in found.lattices):
        notes.append(
            "the lattice is seen along one direction only, so that the steps along both axes are "
            "taken to be equal"
        )
    return notes
