"""Whether an experiment has what its S-matrix needs.

Numbers in, findings out: energies in eV, angles in mrad, lengths in Å, nothing read and nothing
reconstructed. `check` asks every question at once and answers with findings: an error where the
S-matrix cannot be determined, a warning where it is known to suffer. The quantities themselves are
in `sampling`, whose *measured* thresholds the ones here continue.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..physics.limits import chromatic_angle, source_angle
from ..physics.optics import FWHM, wavelength
from .sampling import (
    AIRY_MARGIN,
    beams_in_aperture as beams_in_aperture,
    DARK_FIELD,
    DATA_PER_MODE,
    default_depth_range as default_depth_range,
    depth_of_field as depth_of_field,
    depth_unit as depth_unit,
    distinct_foci as distinct_foci,
    electrons_per_cell as electrons_per_cell,
    FEWEST_ELECTRONS,
    FOCAL_RANGE,
    HIGHEST_TRANSFER,
    largest_scan_step as largest_scan_step,
    largest_scan_step_of_modes as largest_scan_step_of_modes,
    lateral_unit as lateral_unit,
    least_dose as least_dose,
    modes_of_order as modes_of_order,
    needed_order as needed_order,
    overdetermination as overdetermination,
    required_focal_range as required_focal_range,
    required_window as required_window,
    tilt_coverage as tilt_coverage,
    window_of as window_of,
)


AIRY_LEAST = 2.0  # lambda/alpha; with less, the window cuts the bright lobes of the probe
FOCAL_RANGE_LEAST = 4.0  # lambda/alpha²; measured: 3.7 leaves 36 % error, 1.5 leaves 53 %
SERIES_LEAST = 1.0  # lambda/alpha²; foci closer than the depth of focus add no depth information
FOCI_FOR_BEAMS = 3  # measured: one fits the data exactly with a wrong S, two leave 46 %
DATA_PER_MODE_LEAST = 3.0
HALF = 0.5  # of the scattered wave, that the modes must hold


class Finding(NamedTuple):
    """One answer of `check`; `key` is the name of the quantity in the experiment file."""

    severity: Literal["error", "warning"]
    key: str
    message: str


def check(
    *,
    energy: float,
    semiangle: float,
    defoci: Sequence[float],
    scan_step: tuple[float, float],
    scan_shape: tuple[int, int],
    detector_pixel: float,
    detector_shape: tuple[int, int],
    center: tuple[float, float] | None = None,
    representation: str = "modes",
    order: int = 8,
    depth_range: tuple[float, float] | None = None,
    plane: float | None = None,
    electrons: Sequence[float] | None = None,
    spread: float | None = None,
    source: float | None = None,
) -> list[Finding]:
    """Everything that stands between this experiment and its S-matrix, errors first.

    `energy` in eV, `semiangle` and `detector_pixel` in mrad, `defoci`, `scan_step`, `depth_range`
    and the reference `plane` (default: middle of the depth range) in Å, `center` in pixels
    (default: n//2); `representation` is `modes` or `beams`, `order` that of the modes. Where they
    are known: `electrons` in a mean frame of each scan, the rms focal `spread` and the rms size of
    the `source` in Å.
    """
    depths = depth_range or default_depth_range(semiangle, energy, defoci)
    middle = sum(depths) / 2 if plane is None else plane
    window = window_of(detector_pixel, energy)
    half = [n // 2 for n in detector_shape] if center is None else center
    reach = detector_pixel * min(
        min(c + 0.5, n - c - 0.5) for c, n in zip(half, detector_shape, strict=True)
    )
    findings = _check_detector(semiangle, detector_pixel, reach)
    findings += _check_window(energy, semiangle, defoci, middle, window)
    if representation == "beams":
        findings += _check_foci(energy, semiangle, defoci)
        findings += _check_step_of_beams(energy, semiangle, scan_step)
        findings += _check_field(scan_step, scan_shape, window)
    else:
        probe = min(window, required_window(semiangle, energy, defoci, middle))
        findings += _check_foci_of_modes(energy, semiangle, defoci)
        findings += _check_step_of_modes(len(defoci), scan_step, window, probe, order)
        findings += _check_order(energy, semiangle, depths, middle, order, reach)
    if electrons is not None:
        findings += _check_dose(energy, semiangle, scan_step, electrons)
    findings += _check_coherence(energy, semiangle, spread, source)
    return sorted(findings, key=lambda finding: finding.severity)


def _check_detector(semiangle: float, pixel: float, reach: float) -> list[Finding]:
    """The bright-field disc must fit with a pixel around it; some dark field should be seen."""
    key = "geometry.detector_pixel_mrad"
    seen = f"the detector reaches {reach:.3g} mrad from its centre"
    if reach < semiangle + pixel:
        message = (
            f"{seen}, but the bright-field disc has a radius of {semiangle:.4g} mrad and must fit "
            "inside with at least one pixel around it; check beam.semiangle_mrad, "
            "geometry.detector_pixel_mrad and geometry.center, or record with a shorter camera "
            "length"
        )
        return [Finding("error", key, message)]
    if reach < DARK_FIELD * semiangle:
        message = (
            f"{seen}, hardly beyond the bright-field disc ({semiangle:.4g} mrad); fine detail and "
            f"depth come from the dark field, {DARK_FIELD * semiangle:.3g} mrad or more is better"
        )
        return [Finding("warning", key, message)]
    return []


def _check_dose(
    energy: float, semiangle: float, scan_step: tuple[float, float], electrons: Sequence[float]
) -> list[Finding]:
    """Fewer electrons than any retrieval was tried with; a denser scan makes up for weak frames."""
    found = electrons_per_cell(semiangle, energy, scan_step, electrons)
    if found >= FEWEST_ELECTRONS:
        return []
    frame = sum(electrons) / len(electrons)
    dose = frame / (scan_step[0] * scan_step[1])
    needed = least_dose(semiangle, energy, len(electrons))
    message = (
        f"{frame:.3g} electrons per frame, {dose:.3g} per Å² and scan, are {found:.3g} in a "
        f"resolution cell (λ/2α)² of all scans; retrieval is known to work down to "
        f"{FEWEST_ELECTRONS}: {needed:.3g} per Å² in each of {len(electrons)} scans, "
        f"{needed * scan_step[0] * scan_step[1]:.3g} per frame. Expect weak and blurred sections"
    )
    return [Finding("warning", "scans.file", message)]


def _check_coherence(
    energy: float, semiangle: float, spread: float | None, source: float | None
) -> list[Finding]:
    """What focal spread and source take away, the model can describe but not bring back."""
    findings = []
    if spread and (limit := chromatic_angle(spread * FWHM, energy)) < semiangle:
        message = (
            f"the focal spread, {spread * FWHM:.3g} Å wide at half maximum, exceeds the depth of "
            f"focus 2λ/α² = {2 * depth_unit(semiangle, energy):.3g} Å; above {limit:.3g} mrad a "
            "wider aperture adds little depth resolution"
        )
        findings.append(Finding("warning", "beam.semiangle_mrad", message))
    if source and (limit := source_angle(source, energy)) < semiangle:
        message = (
            f"the source, {source * FWHM:.3g} Å wide at half maximum, exceeds the Airy disc of "
            f"{0.5145 * lateral_unit(semiangle, energy):.3g} Å; above {limit:.3g} mrad a wider "
            "aperture adds little resolution"
        )
        findings.append(Finding("warning", "beam.source_size_A", message))
    return findings


def _check_window(
    energy: float, semiangle: float, defoci: Sequence[float], plane: float, window: float
) -> list[Finding]:
    """The window must hold every defocused probe."""
    needed, unit = (
        required_window(semiangle, energy, defoci, plane),
        lateral_unit(semiangle, energy),
    )
    if window >= needed:
        return []
    worst = max(defoci, key=lambda focus: abs(focus - plane))
    allowed = max(0.0, (window - AIRY_MARGIN * unit) / (2e-3 * semiangle))
    finest = wavelength(energy) / needed * 1e3
    message = (
        f"the window behind a frame, wavelength/detector pixel, is {window:.3g} Å; the scan of "
        f"defocus {worst:g} Å, {abs(worst - plane):.3g} Å from the reference plane at "
        f"{plane:.3g} Å, needs {needed:.3g} Å. Bin the detector less (pixels of at most "
        f"{finest:.3g} mrad) or use defoci within {allowed:.3g} Å of the reference plane"
    )
    least = needed - (AIRY_MARGIN - AIRY_LEAST) * unit
    return [Finding("error" if window < least else "warning", "scans.defocus", message)]


def _check_foci(energy: float, semiangle: float, defoci: Sequence[float]) -> list[Finding]:
    """Beams need three foci over a wide range."""
    unit, span = depth_unit(semiangle, energy), max(defoci) - min(defoci)
    needed, count = (
        required_focal_range(semiangle, energy),
        distinct_foci(semiangle, energy, defoci),
    )
    scans = f"{len(defoci)} scan{'s' * (len(defoci) > 1)}"
    given = f"{scans} over {span:g} Å ({span / unit:.2g} λ/α²)"
    remedy = (
        f"record at least {FOCI_FOR_BEAMS} foci, λ/(2α²) = {unit / 2:.3g} Å or more apart, over "
        f"{needed:.3g} Å ({FOCAL_RANGE:g} λ/α²), or set method.representation to 'modes', which "
        "needs fewer"
    )
    if count < FOCI_FOR_BEAMS:
        kept = f", of which {count} differ" if count < len(defoci) else ""
        need = f"'beams' needs {FOCI_FOR_BEAMS} different foci to determine S"
        return [Finding("error", "scans.defocus", f"{need}, given: {given}{kept}; {remedy}")]
    if span < FOCAL_RANGE_LEAST * unit:
        message = f"the defoci are too close to determine S in 'beams': {given}; {remedy}"
        return [Finding("error", "scans.defocus", message)]
    if span < needed:
        message = f"the range of defoci is short for 'beams': {given}; better {needed:.3g} Å"
        return [Finding("warning", "scans.defocus", message)]
    return []


def _check_foci_of_modes(energy: float, semiangle: float, defoci: Sequence[float]) -> list[Finding]:
    """One focus is enough for modes; a series whose foci are as good as one is a slip."""
    unit, span = depth_unit(semiangle, energy), max(defoci) - min(defoci)
    if len(defoci) == 1 or span >= SERIES_LEAST * unit:
        return []
    message = (
        f"the defoci are too close to determine S better than one scan would: {len(defoci)} scans "
        f"over {span:g} Å ({span / unit:.2g} λ/α²); a focal series wants a range of "
        f"{required_focal_range(semiangle, energy):.3g} Å ({FOCAL_RANGE:g} λ/α²), at least "
        f"{SERIES_LEAST * unit:.3g} Å. Are they in Å? For repeated scans of one focus add "
        "`accept_implausible: true`"
    )
    return [Finding("error", "scans.defocus", message)]


def _check_step_of_beams(
    energy: float, semiangle: float, scan_step: tuple[float, float]
) -> list[Finding]:
    """lambda/(2 alpha), however defocused the probe is."""
    limit = largest_scan_step(semiangle, energy)
    if max(scan_step) <= 1.001 * limit:
        return []
    message = (
        f"a step of {max(scan_step):g} Å is above the limit of 'beams', λ/(2α) = {limit:.3g} Å, "
        "which defocus does not lift; scan finer or set method.representation to 'modes'"
    )
    return [Finding("error", "geometry.scan_step", message)]


def _check_field(
    scan_step: tuple[float, float], scan_shape: tuple[int, int], window: float
) -> list[Finding]:
    """Only where every part of the window has been scanned are all beams determined."""
    field = [n * step for n, step in zip(scan_shape, scan_step, strict=True)]
    if min(field) >= window:
        return []
    message = (
        f"the scanned field, {field[0]:.3g} x {field[1]:.3g} Å, is smaller than the window of "
        f"{window:.3g} Å: no pixel of S in 'beams' is seen by the whole window; sections near "
        "the middle still come out, 'modes' suffer less"
    )
    return [Finding("warning", "method.representation", message)]


def _check_step_of_modes(
    scans: int, scan_step: tuple[float, float], window: float, probe: float, order: int
) -> list[Finding]:
    """Enough positions in a window for the modes, and probes (widest: `probe` Å) that overlap."""
    key, step, modes = "geometry.scan_step", max(scan_step), modes_of_order(order)
    findings = []
    data = scans * window**2 / (scan_step[0] * scan_step[1]) / modes
    limit = largest_scan_step_of_modes(window, scans, order)
    if data < DATA_PER_MODE:
        message = (
            f"with a step of {step:g} Å there are {data:.2g} positions in a window for each of the "
            f"{modes} modes of order {order}; {DATA_PER_MODE:g} are needed: a step of at most "
            f"{limit:.3g} Å, a lower method.order, or more scans"
        )
        findings += [Finding("error" if data < DATA_PER_MODE_LEAST else "warning", key, message)]
    if step > probe / 2:
        message = (
            f"a step of {step:g} Å leaves neighbouring probes, {probe:.3g} Å wide on the "
            f"reference plane, {'apart' if step > probe else 'hardly overlapping'}; scan with at "
            f"most {probe / 2:.3g} Å or defocus more"
        )
        findings += [Finding("error" if step > probe else "warning", key, message)]
    return findings


def _check_order(
    energy: float,
    semiangle: float,
    depths: tuple[float, float],
    plane: float,
    order: int,
    reach: float,
) -> list[Finding]:
    """The modes must be able to hold a layer at either end of the depth range."""
    beyond = max(reach - semiangle, 0.0) * 1e-3 / wavelength(energy)
    transfer = min(HIGHEST_TRANSFER, beyond)
    thickness = 2 * max(abs(depth - plane) for depth in depths)
    covered = tilt_coverage(order, semiangle, thickness, transfer)
    if covered >= HALF:
        return []
    half = _supported_thickness(order, semiangle, transfer, thickness) / 2
    better = needed_order(semiangle, thickness, transfer)
    message = (
        f"modes of order {order} hold {covered:.0%} of the wave that a layer at the end of the "
        f"depth range {depths[0]:.4g} to {depths[1]:.4g} Å scatters by {transfer:.2g} 1/Å; they "
        f"support {half:.3g} Å to either side of the reference plane at {plane:.3g} Å. Narrow "
        f"method.depth_range or raise method.order to {better}"
    )
    return [Finding("warning", "method.order", message)]


def _supported_thickness(order: int, semiangle: float, transfer: float, most: float) -> float:
    """Thickness below `most` (Å) at which the coverage falls to one half, by bisection."""
    low, high = 0.0, most
    for _ in range(30):
        guess = (low + high) / 2
        enough = tilt_coverage(order, semiangle, guess, transfer) >= HALF
        low, high = (guess, high) if enough else (low, guess)
    return low
