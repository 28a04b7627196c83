"""What an S-matrix needs of an experiment, quantity by quantity.

Numbers in, numbers out: energies in eV, angles in mrad, lengths in Å. The natural units are
lambda/alpha (resolution), lambda/alpha² (depth) and the window L = lambda/(detector pixel).

Thresholds marked *measured* come from retrievals of simulated series with a known answer: two
layers 100 Å apart (300 kV, 19 mrad), nanotubes 90 Å apart (80 kV, 25 mrad), gold sheets 120 Å apart
(300 kV, 22 mrad).
"""

import math
from collections.abc import Sequence

import numpy as np

from ..physics.optics import wavelength


AIRY_MARGIN = 3.0  # lambda/alpha around the cone; the window then loses about 2 % of the probe
FOCAL_RANGE = 7.0  # lambda/alpha²; measured: 7.3 determines S to 0.3 %
DATA_PER_MODE = 5.0  # D (L/s)² per mode; measured: 4.5 works, 2.3 fails
DARK_FIELD = 1.25  # detector edge in units of the semi-angle
FEWEST_ELECTRONS = 4000  # in (lambda/2 alpha)², all scans; measured: the fewest that were tried
HIGHEST_TRANSFER = 0.7  # 1/Å, beyond which atoms of 0.35 Å rms width carry little signal


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


def electrons_per_cell(
    semiangle: float,
    energy: float,
    scan_step: tuple[float, float],
    electrons: Sequence[float],
) -> float:
    """Electrons in (lambda/2 alpha)² from all scans, of `electrons` in a mean frame of each.

    However the dose is shared among steps and foci, this is what tells S from noise. *Measured* on
    the nanotubes, with Poisson's loss: sections correlate with the truth by 0.98 at 280,000
    (16,000 a frame), 0.94 at a tenth and 0.91 at a twentieth of it, layers then being 60 Å thick
    for 37; two strong layers at 300 kV still came out by 0.93 to 0.97 at 4,000 (1,000 a frame).
    """
    cell = (lateral_unit(semiangle, energy) / 2) ** 2
    return sum(electrons) * cell / (scan_step[0] * scan_step[1])


def least_dose(semiangle: float, energy: float, scans: int) -> float:
    """Electrons per Å² and scan below which nobody has tried: 4,000 in (lambda/2 alpha)²."""
    return FEWEST_ELECTRONS / scans / (lateral_unit(semiangle, energy) / 2) ** 2


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


def round_below(value: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(power * max(n for n in (1, 2, 5) if n * power <= value * (1 + 1e-9)))
