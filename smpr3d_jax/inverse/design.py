"""What an S-matrix experiment needs, and whether this one has it.

Numbers in, numbers out: energies in eV, angles in mrad, lengths in Å, nothing read and nothing
reconstructed. `check` asks every question at once and answers with findings: an error where the
S-matrix cannot be determined, a warning where it is known to suffer. The natural units are
lambda/alpha (resolution), lambda/alpha² (depth) and the window L = lambda/(detector pixel).

Thresholds marked *measured* come from retrievals of simulated series with a known answer: two
layers 100 Å apart (300 kV, 19 mrad), nanotubes 90 Å apart (80 kV, 25 mrad), gold sheets 120 Å apart
(300 kV, 22 mrad).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ..physics.optics import wavelength


AIRY_MARGIN = 3.0  # lambda/alpha around the cone; the window then loses about 2 % of the probe
AIRY_LEAST = 2.0  # lambda/alpha; with less, the window cuts the bright lobes of the probe
FOCAL_RANGE = 7.0  # lambda/alpha²; measured: 7.3 determines S to 0.3 %
FOCAL_RANGE_LEAST = 4.0  # lambda/alpha²; measured: 3.7 leaves 36 % error, 1.5 leaves 53 %
SERIES_LEAST = 1.0  # lambda/alpha²; foci closer than the depth of focus add no depth information
FOCI_FOR_BEAMS = 3  # measured: one fits the data exactly with a wrong S, two leave 46 %
DATA_PER_MODE = 5.0  # D (L/s)² per mode; measured: 4.5 works, 2.3 fails
DATA_PER_MODE_LEAST = 3.0
DARK_FIELD = 1.25  # detector edge in units of the semi-angle
HALF = 0.5  # of the scattered wave, that the modes must hold
HIGHEST_TRANSFER = 0.7  # 1/Å, beyond which atoms of 0.35 Å rms width carry little signal


class Finding(NamedTuple):
    """One answer of `check`; `key` is the name of the quantity in the experiment file."""

    severity: Literal["error", "warning"]
    key: str
    message: str


def depth_of_field(semiangle: float, energy: float) -> float:
    """Depth (Å) over which a perfect probe keeps half its axial intensity: 1.7718 lambda/alpha².

    The full width at half maximum of I(z) = sinc²(pi alpha² z/(2 lambda)).
    """
    return 1.7718 * depth_unit(semiangle, energy)


def depth_unit(semiangle: float, energy: float) -> float:
    """lambda/alpha² in Å, the natural unit of depth; `semiangle` in mrad, `energy` in eV."""
    return wavelength(energy) / (semiangle * 1e-3) ** 2


def lateral_unit(semiangle: float, energy: float) -> float:
    """lambda/alpha in Å, the natural unit of length across the beam."""
    return wavelength(energy) / (semiangle * 1e-3)


def window_of(detector_pixel: float, energy: float) -> float:
    """Length (Å) of the window behind one frame, lambda over the detector pixel (mrad)."""
    return wavelength(energy) / (detector_pixel * 1e-3)


def required_window(
    semiangle: float, energy: float, defoci: Sequence[float], plane: float = 0.0
) -> float:
    """Window (Å) that holds the probe of every scan on the reference plane.

    L >= 2 alpha max|z_f - plane| + 3 lambda/alpha: the cone of rays, and the Airy tail of a hard
    aperture, of which about 0.2 lambda/(alpha L) lies outside.
    """
    margin = AIRY_MARGIN * lateral_unit(semiangle, energy)
    return _cone(semiangle, defoci, plane) + margin


def _cone(semiangle: float, defoci: Sequence[float], plane: float) -> float:
    """Widest geometrical probe (Å) on the plane."""
    return 2e-3 * semiangle * max(abs(focus - plane) for focus in defoci)


def beams_in_aperture(semiangle: float, energy: float, window: float) -> int:
    """Plane waves of the window's grid inside the aperture, about pi (alpha L/lambda)²."""
    radius = window / lateral_unit(semiangle, energy)
    n = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    return int(np.sum(n[:, None] ** 2 + n[None, :] ** 2 <= radius**2))


def modes_of_order(order: int) -> int:
    """Polynomials of two variables up to radial `order`: (n+1)(n+2)/2."""
    return (order + 1) * (order + 2) // 2


def overdetermination(semiangle: float, energy: float, scans: int, scan_step: float) -> float:
    """Informative data per unknown of the full S-matrix, D/(2 pi) (lambda/(alpha s))², at most 2D.

    A focus gives the intensity of a function band-limited to the aperture, so steps below
    lambda/(4 alpha) only repeat it.
    """
    ratio = scans / (2 * math.pi) * (lateral_unit(semiangle, energy) / scan_step) ** 2
    return min(ratio, 2.0 * scans)


def largest_scan_step(semiangle: float, energy: float) -> float:
    """Coarsest step (Å) at which every beam is told apart by its phase ramp: lambda/(2 alpha)."""
    return lateral_unit(semiangle, energy) / 2


def largest_scan_step_of_modes(window: float, scans: int, order: int) -> float:
    """Coarsest step (Å) for tilt modes, from D (L/s)² >= 5 x modes (*measured*)."""
    return window * math.sqrt(scans / (DATA_PER_MODE * modes_of_order(order)))


def required_focal_range(semiangle: float, energy: float) -> float:
    """Range of defoci (Å) that determines S in beams: 7 lambda/alpha², with three foci or more.

    Two foci mix S(k, k+Q) and its twin with determinant 2|sin(pi lambda (z1 - z2) Q²)|: the small Q
    ask for a large range, and more foci inside a narrow one do not help.
    """
    return FOCAL_RANGE * depth_unit(semiangle, energy)


def distinct_foci(semiangle: float, energy: float, defoci: Sequence[float]) -> int:
    """Number of foci that say something different: at least lambda/(2 alpha²) apart.

    There the determinant of `required_focal_range` first reaches its maximum at Q = alpha/lambda.
    """
    apart, last, count = depth_unit(semiangle, energy) / 2, -math.inf, 0
    for focus in sorted(defoci):
        if focus - last >= apart:
            last, count = focus, count + 1
    return count


def needed_order(semiangle: float, thickness: float, transfer: float) -> int:
    """Order of the tilt polynomials for layers `thickness` (Å) apart: pi alpha t q + 2, rounded up.

    A layer t/2 from the reference plane turns the phase by pi alpha t q at the aperture's edge, for
    a `transfer` q in 1/Å.
    """
    return math.ceil(math.pi * semiangle * 1e-3 * thickness * transfer + 2)


def tilt_coverage(order: int, semiangle: float, thickness: float, transfer: float) -> float:
    """Part (0 to 1) of the wave from a layer t/2 off the reference plane that `order` can hold.

    exp(i x u) over the unit disc, x = pi alpha t q, has the energy (2 (n+1) J_{n+1}(x)/x)² in the
    Zernike polynomials of radial order n; they add to one since sum k² J_k² = x²/4.
    """
    x = math.pi * semiangle * 1e-3 * thickness * transfer
    if x < 1e-3:
        return 1.0
    k = np.arange(1, order + 2)
    # Bessel's integral; the trapezoid rule over a period converges beyond k + x points
    angle = 2 * math.pi * np.arange(n := 2 * (order + math.ceil(x) + 16)) / n
    bessel = np.mean(np.cos(k[:, None] * angle - x * np.sin(angle)), axis=1)
    return float(np.sum((2 * k * bessel / x) ** 2))


def default_depth_range(
    semiangle: float, energy: float, defoci: Sequence[float]
) -> tuple[float, float]:
    """Where a specimen is looked for when nobody says: (first, last) depth in Å.

    A series is laid around its specimen, so the middle half of the focal range; a single scan of
    defocus f has it between 0 and f, at most 2 lambda/alpha² away. Never less than 2 lambda/alpha².
    """
    unit = depth_unit(semiangle, energy)
    low, high = min(defoci), max(defoci)
    if high - low < unit / 2:
        far = math.copysign(min(abs(low), 2 * unit), low)
        low, high = min(0.0, far) - unit / 2, max(0.0, far) + unit / 2
        middle, half = (low + high) / 2, (high - low) / 2
    else:
        middle, half = (low + high) / 2, (high - low) / 4
    half = max(half, unit)
    return middle - half, middle + half


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
) -> list[Finding]:
    """Everything that stands between this experiment and its S-matrix, errors first.

    `energy` in eV, `semiangle` and `detector_pixel` in mrad, `defoci`, `scan_step`, `depth_range`
    and the reference `plane` (default: middle of the depth range) in Å, `center` in pixels
    (default: n//2); `representation` is `modes` or `beams`, `order` that of the modes.
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
