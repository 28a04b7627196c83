"""What an experiment file may say, and which values are believable.

One record a section and one line a key: name, type, default, and what it is. The description is
the comment in `experiment.template` and in the JSON schema, so a new key is one new line. Values
outside a `_believable` range are questioned as slips of units; `accept_implausible: true` at the
top of the file lets them pass. Lengths in Å, angles in mrad, energies in eV; pairs are (y, x).
"""

import difflib
import math
import os.path
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
    PrivateAttr,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from ..inverse.refinement import REFINABLE
from ..physics.optics import POLAR


Size = float | int


def nearest(word: object, choices: Iterable[str]) -> str | None:
    """The choice most like `word` in any case, ties by the common beginning; None if none is."""
    best, score = None, (0.6, 0)
    for choice in choices:
        a, b = str(word).lower(), choice.lower()
        likeness = difflib.SequenceMatcher(None, a, b).ratio(), len(os.path.commonprefix([a, b]))
        if likeness > score:
            best, score = choice, likeness
    return best


def _fail(what: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError("experiment", "{what}", {"what": what, **context})


def _believable(
    low: Size, high: Size, unit: str, *slips: tuple[str, Size], zero: bool = False
) -> AfterValidator:
    """Question numbers outside a plausible size, see `_question`."""
    return AfterValidator(_question(low, high, unit, *slips, zero=zero))


def _question(
    low: Size, high: Size, unit: str, *slips: tuple[str, Size], zero: bool = False
) -> Callable[[Any, Any], Any]:
    """Question numbers whose size is outside [low, high] (0 passes if `zero`).

    `slips` are the units somebody may have meant instead, each with its size in `unit`; those that
    make the value believable are proposed.
    """

    def question(value: Any, info: Any) -> Any:
        if value is None or (info.context or {}).get("accept_implausible"):
            return value
        for number in value if isinstance(value, tuple) else (value,):
            if (zero and number == 0) or low <= abs(number) <= high:
                continue
            meant = [
                f"did you write {name}? That is {number * factor:.6g} {unit}"
                for name, factor in slips
                if low <= abs(number * factor) <= high
            ]
            limits = f"{low:.9g} to {high:.9g} {unit} would be plausible" + " in size" * zero
            remedy = meant or ["if it is right, add `accept_implausible: true` to the file"]
            raise _fail("; ".join([limits, *remedy]))
        return value

    return question


def _both(value: Any) -> Any:
    """One number stands for both axes."""
    if isinstance(value, list | tuple) or value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail("must be one number or [y, x]")
    return (value, value)


def _some(scans: tuple[Any, ...]) -> tuple[Any, ...]:
    if not scans:
        raise _fail("must have at least one scan, such as {file: scan_0.h5, defocus: 100}")
    return scans


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise _fail(f"the first depth must lie above the second: [{pair[1]:g}, {pair[0]:g}]?")
    return pair


def _layered(depths: tuple[float, ...]) -> tuple[float, ...]:
    if not depths:
        raise _fail("must name at least one depth, such as [0, 90]")
    if any(b <= a for a, b in zip(depths, depths[1:], strict=False)):
        raise _fail(f"must increase: {sorted(set(depths))}?")
    return depths


def _located(path: Path, info: Any) -> Path:
    """The path as seen from the folder of the experiment file, which must hold it."""
    folder = (info.context or {}).get("folder")
    if folder is None:
        return path
    full = Path(folder) / path
    if not full.is_file():
        beside = [p.name for p in full.parent.glob("*") if p.is_file()]
        close = nearest(full.name, beside)
        raise _fail(f"no such file: {full}" + (f"; nearest file {close!r}" if close else ""))
    return full


def _refinable(name: str) -> str:
    """A parameter that `refine` may name."""
    return _one_of(REFINABLE, name, "cannot be refined")


CONSTRAINTS = (
    "centred_probe", "orthogonal_modes", "probe_in_aperture", "fixed_probe_intensity",
    "positive_phase", "no_gain", "smooth_slices", "equal_slices",
)  # fmt: skip
"""What `object.constraints` may name: functions of `inverse.constraints`."""


def _constraint(name: str) -> str:
    return _one_of(CONSTRAINTS, name, "is no constraint")


def _one_of(known: Sequence[str], name: str, complaint: str) -> str:
    if name not in known:
        close = nearest(name, known)
        hint = f"; did you mean {close!r}?" if close else f"; known: {', '.join(known)}"
        raise _fail(f"{name!r} {complaint}{hint}")
    return name


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise _fail(f"names {twice[0]!r} twice")
    return names


def _known_aberration(name: str) -> str:
    if name.upper().replace("O", "0") in ("C10", "DEF0CUS"):
        raise _fail("the defocus belongs to each scan: write `defocus` (= -C10) under scans")
    if name not in POLAR:
        close = nearest(name, POLAR[1:])
        hint = f"nearest valid key {close!r}" if close else f"valid keys are {', '.join(POLAR[1:])}"
        raise _fail(f"unknown key; {hint}")
    return name


def _aberrations(values: dict[str, float], info: Any) -> dict[str, float]:
    """Magnitudes in Å, angles in rad."""
    for name, value in values.items():
        try:
            _ANGLE(value, info) if name.startswith("phi") else _COEFFICIENT(value, info)
        except PydanticCustomError as error:
            raise _fail(str(error.message()), key=name) from None
    return values


_LENGTH = _believable(1e-3, 1e6, "Å", ("m", 1e10), ("pm", 1e-2), zero=True)
_ANGLE = _question(0, 2 * math.pi, "rad", ("degrees", math.pi / 180))
_COEFFICIENT = _question(1e-3, 1e10, "Å", ("m", 1e10), ("pm", 1e-2), zero=True)

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]
Length = Annotated[Number, _LENGTH]
Pair = tuple[Length, Length]
Energy = Annotated[Positive, _believable(1e3, 2e6, "eV", ("kV", 1e3), ("MV", 1e6))]
Semiangle = Annotated[Positive, _believable(0.2, 200, "mrad", ("rad", 1e3), ("µrad", 1e-3))]
DetectorAngle = Annotated[
    Number, Field(ge=0), _believable(0.02, 1e3, "mrad", ("rad", 1e3), ("µrad", 1e-3), zero=True)
]
Pixel = Annotated[Positive, _believable(0.005, 20, "mrad", ("rad", 1e3), ("µrad", 1e-3))]
Step = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(_both),
    _believable(0.01, 1e4, "Å", ("nm", 10), ("µm", 1e4), ("m", 1e10), ("pm", 1e-2)),
    WithJsonSchema({"type": ["number", "array"], "items": {"type": "number"}}),
]
DepthRange = Annotated[tuple[Length, Length], AfterValidator(_rising)]
LayerDepths = Annotated[tuple[Length, ...], AfterValidator(_layered)]
Rotation = Annotated[Number, _believable(0, 360, "degrees")]
Aberrations = Annotated[
    dict[Annotated[str, AfterValidator(_known_aberration)], Number], AfterValidator(_aberrations)
]
File = Annotated[Path, AfterValidator(_located)]
Refined = Annotated[str, AfterValidator(_refinable)]


def _key(default: Any, description: str) -> Any:
    """An optional key."""
    return Field(default, description=description)


class Record(BaseModel):
    """A frozen section of the experiment; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Beam(Record):
    """What every scan shares of the probe."""

    energy_ev: Energy | None = _key(None, "beam energy, eV")
    semiangle_mrad: Semiangle | None = _key(None, "aperture semi-angle, mrad")
    aberrations: Aberrations = _key({}, "C12, phi12, ... C56: Å and rad, all scans")
    source_size_A: Positive | None = _key(None, "rms size of the source; null: a point")
    defocus_spread_A: Positive | None = _key(None, "rms; null: from the two below, or none")
    cc_mm: Positive | None = _key(None, "chromatic aberration, with energy_spread_ev")
    energy_spread_ev: Positive | None = _key(None, "full width at half maximum")

    @model_validator(mode="after")
    def _consistent(self):
        if (self.cc_mm is None) != (self.energy_spread_ev is None):
            missing = "cc_mm" if self.cc_mm is None else "energy_spread_ev"
            raise _fail("cc_mm and energy_spread_ev say something only together", key=missing)
        if self.cc_mm is not None and self.defocus_spread_A is not None:
            raise _fail("is said twice: here, and by cc_mm and energy_spread_ev",
                        key="defocus_spread_A")  # fmt: skip
        return self


class ScanEntry(Record):
    """One scan of the series."""

    file: File = Field(description="data file, relative to this file")
    defocus: Length | None = _key(None, "Å; positive: focused at depth z = defocus")
    shift: Pair = _key((0.0, 0.0), "[y, x] Å: where this scan starts")
    aberrations: Aberrations = _key({}, "of this scan, instead of the beam's")
    dataset: str | None = _key(None, "path inside an HDF5 file, if it has several")
    scan_shape: tuple[Count, Count] | None = _key(None, "[y, x] of a stack of frames")


class Geometry(Record):
    """How scan and detector lie to each other; what is missing here is asked of the files."""

    scan_step: Step | None = _key(None, "Å, one number or [y, x]")
    rotation_deg: Rotation = _key(0.0, "scan against detector, from x towards y")
    transpose: Flag = _key(False, "exchange the axes of the scan, before rotation")
    detector_pixel_mrad: Pixel | None = _key(None, "angle of a detector pixel, mrad")
    center: tuple[Number, Number] | None = _key(None, "[y, x] pixels; null: n//2")
    mask: File | None = _key(None, ".npy or HDF5, 1: use this pixel; also what the data files say")
    pixel_integration: Count = _key(2, "1: pixels sample the intensity, 2: integrate")
    blur_pixels: Positive | None = _key(None, "rms point spread of the camera; null: none")
    background: Annotated[Number, Field(ge=0)] | None = _key(
        None, "electrons per pixel and frame beside the beam's; null: none"
    )
    halo: Flag | None = _key(
        None, "the probe goes on beyond its window; null: with `refine` and `structure`"
    )


class Preprocess(Record):
    """What is done to the frames before anything else, in this order; `geometry.mask` comes first.

    Everything in `geometry` is said of the pixels in the files.
    """

    counts_per_electron: Positive | None = _key(
        None, "of an integrating camera: divide by it and round; null: frames hold electrons"
    )
    bad_pixels: Flag = _key(False, "find hot, dead and flickering pixels, and mask them")
    descan: Annotated[int, Field(strict=True, ge=1, le=3)] | None = _key(
        None, "order, 1 to 3, of a drift of the pattern over the scan, undone by whole pixels"
    )
    crop: tuple[Count, Count] | None = _key(None, "[y, x] pixels about the center; null: all")
    bin: Count = _key(1, "sum so many pixels along each axis")

    @model_validator(mode="after")
    def _consistent(self):
        for n in self.crop or ():
            if n % self.bin:
                raise _fail(f"must be multiples of bin = {self.bin}, not {n}", key="crop")
        return self


class Refinement(Record):
    """How what `refine` names is moved."""

    first: Count = _key(4, "iteration in which parameters begin to move")
    every: Count = _key(2, "they move in every so-many-th from there")
    optics_every: Count = _key(2, "aberrations move in every so-many-th of these")
    rate: Annotated[Positive, Field(le=3)] = _key(0.3, "step, in rad at the aperture's edge")
    position_rate: Annotated[Positive, Field(le=3)] = _key(1.5, "the same, of each position")
    position_sigma_A: Positive | None = _key(None, "size of offsets, Å; null: half a scan step")


class Stop(Record):
    """When to stop before the last iteration."""

    patience: Count = _key(10, "iterations without a better held-out deviance")


class Method(Record):
    """How the specimen is recovered."""

    name: Literal["smatrix", "multislice", "singleslice"] = _key(
        "smatrix", "what stands for the specimen"
    )
    representation: Literal["modes", "beams"] = _key("modes", "unknowns of the S-matrix")
    order: Annotated[int, Field(strict=True, ge=0, le=40)] = _key(
        8, "of the tilt polynomials, for modes"
    )
    depth_range: DepthRange | None = _key(None, "[first, last] Å; null: from sections or foci")
    subspace_weight: Annotated[Number, Field(ge=0, le=1)] = _key(
        1.0, "of the depth-range subspace, 0: off"
    )
    subspace_tolerance: Annotated[Number, Field(gt=0, lt=1)] | None = _key(
        None, "smallest eigenvalue kept; null: by the dose"
    )
    loss: Literal["poisson", "amplitude", "shifted_amplitude", "truncated_amplitude"] = _key(
        "poisson", "what is minimised"
    )
    background: Annotated[Positive, Field(le=10)] = _key(0.002, "electrons per pixel, in the model")
    iterations: Count = _key(60, "at most so many")
    held_out: Annotated[Number, Field(ge=0, lt=0.9)] = _key(
        0.05, "part of the positions never fitted"
    )
    stop: Stop | None = _key(None, "{patience: 10} or null")
    seed: Annotated[int, Field(strict=True, ge=0)] = _key(0, "of every random choice")
    precision: Literal["float32", "float64"] = _key("float32", "of the arrays")
    plane: Length | None = _key(None, "reference plane, Å; null: middle of the range")


class Object(Record):
    """Object and probe of `method: {name: multislice}` or `singleslice`, and how they are found."""

    slices: Count | None = _key(None, "null: one for every half λ/α² of the depth range")
    parametrisation: Literal["transmission", "phase", "potential"] = _key(
        "transmission", "of a slice; phase and potential absorb nothing"
    )
    object_states: Count = _key(1, "incoherent states of the object")
    probe: Literal["pixels", "optics"] = _key("pixels", "free in every pixel, or the lens's own")
    probe_states: Count = _key(1, "incoherent states of a probe in pixels")
    batch: Count = _key(32, "frames a step")
    grouping: Literal["random", "compact", "hilbert"] = _key("random", "of frames into batches")
    rule: Literal["rpie", "epie", "lsqml", "adam"] = _key("rpie", "how object and probe move")
    step: Annotated[Positive, Field(le=2)] = _key(0.9, "part of the safe step; adam: in rad or t")
    probe_step: Annotated[Number, Field(ge=0, le=2)] = _key(0.15, "the same of the probe")
    last_step: Annotated[Positive, Field(le=1)] = _key(0.1, "what is left of steps at the end")
    band_limit: Annotated[Positive, Field(le=1.5)] | None = _key(
        None, "part of the Nyquist frequency kept behind each slice; null: all"
    )
    halves: Flag = _key(False, "also from either half of the frames, for their ring correlation")
    constraints: tuple[Annotated[str, AfterValidator(_constraint)], ...] = _key(
        ("centred_probe", "orthogonal_modes"), "applied after each iteration, in this order"
    )


_USES = {
    "inner_mrad": ("annular",),
    "outer_mrad": ("annular", "bright_field"),
    "collector_mrad": ("confocal", "tilt_mean", "scem"),
}


class Sections(Record):
    """Which depths are shown, and how."""

    start: Length | None = _key(None, "first depth, Å; null: from the depth range")
    stop: Length | None = _key(None, "last depth, Å")
    step: Annotated[Length, Field(gt=0)] | None = _key(None, "Å; null: about a tenth of λ/α²")
    mode: Literal["confocal", "tilt_mean", "bright_field", "annular", "scem"] = _key(
        "confocal", "how a section is made"
    )
    inner_mrad: DetectorAngle | None = _key(None, "of the annular detector")
    outer_mrad: DetectorAngle | None = _key(None, "of the annular or bright field")
    collector_mrad: DetectorAngle | None = _key(None, "of confocal, tilt_mean, scem")

    @model_validator(mode="after")
    def _consistent(self):
        if self.start is not None and self.stop is not None and self.stop < self.start:
            raise _fail(f"lies above start = {self.start:g}; exchange them", key="stop")
        inner, outer = self.inner_mrad, self.outer_mrad
        if inner is not None and outer is not None and outer <= inner:
            raise _fail(f"must be larger than inner_mrad = {inner:g}", key="outer_mrad")
        for key, modes in _USES.items():
            if getattr(self, key) is not None and self.mode not in modes:
                raise _fail(
                    f"has no meaning with mode {self.mode!r}; it belongs to {', '.join(modes)}",
                    key=key,
                )
        return self


class Structure(Record):
    """Layers of potential, fitted to the same frames after the S-matrix."""

    depths: LayerDepths = Field(description="[0, 90, ...] Å: where the layers lie")
    steps: Count = _key(4, "of the fit; noise comes in with more")


class Experiment(Record):
    """A whole experiment file."""

    title: str = _key("", "for the report")
    beam: Beam = _key(Beam(), "common to all scans")
    scans: Annotated[tuple[ScanEntry, ...], AfterValidator(_some)] = Field(
        description="a focal series; one entry is a single scan"
    )
    geometry: Geometry = _key(Geometry(), "what is missing is asked of the files")
    preprocess: Preprocess = _key(Preprocess(), "done to the frames first, in this order")
    method: Method = _key(Method(), "everything here has a default that works")
    object: Object = _key(Object(), "of multislice and singleslice ptychography")
    refine: Annotated[tuple[Refined, ...], AfterValidator(_once)] = _key(
        (), "[positions, defocus, C12, ...]: what is fitted beside the specimen"
    )
    refinement: Refinement = _key(Refinement(), "how, and from when")
    sections: Sections = _key(Sections(), "depths of the volume")
    structure: Structure | None = _key(None, "{depths: [0, 90], steps: 4}: also a potential")
    accept_implausible: Flag = _key(False, "let values pass that look like slips")

    _source: str = PrivateAttr("experiment")
    _lines: dict[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self):
        seen: dict[tuple[Path, str | None], int] = {}
        for i, scan in enumerate(self.scans):
            first = seen.setdefault((scan.file, scan.dataset), i)
            if first != i:
                raise _fail(f"the same data as scans[{first}]", key=f"scans[{i}].file")
        self._require_refinable()
        if self.structure is not None and self.method.depth_range is not None:
            (low, high), depths = self.method.depth_range, self.structure.depths
            if depths[0] < low or depths[-1] > high:
                raise _fail(f"must lie inside method.depth_range = [{low:g}, {high:g}]",
                            key="structure.depths")  # fmt: skip
        return self

    def _require_refinable(self) -> None:
        beam, geometry = self.beam, self.geometry
        started = {
            "source_size": ("beam.source_size_A", beam.source_size_A),
            "defocus_spread": ("beam.defocus_spread_A", beam.defocus_spread_A or beam.cc_mm),
            "blur": ("geometry.blur_pixels", geometry.blur_pixels),
            "background": ("geometry.background", geometry.background),
        }
        for name in self.refine:
            key, value = started.get(name, ("", 0.0))
            if value is None:
                raise _fail(f"{name} needs a value to start from: add {key}", key="refine")
            if name == "defocus" and len(self.scans) == 1:
                raise _fail(
                    "defocus of one scan is where the specimen lies in depth, which the data do "
                    "not say; take it out",
                    key="refine",
                )
            if name in ("tilt", "depths") and self.method.name == "smatrix":
                raise _fail(
                    f"{name} cannot be refined with an S-matrix, which absorbs it; take it out",
                    key="refine",
                )
