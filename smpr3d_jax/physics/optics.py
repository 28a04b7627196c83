"""What forms the probe: wavelength, aberrations, aperture.

The aberration surface is chi = (2 pi/lambda) sum C_nm theta^(n+1)/(n+1) cos(m (phi - phi_nm)) with
phi = atan2(k_y, k_x) and Krivanek's names; the lens multiplies by exp(-i chi), so C10 = -defocus
and a positive defocus (underfocus) puts the crossover at depth z = defocus. In Cartesian form
C_nm cos(m(phi - phi_nm)) = C_nma cos(m phi) + C_nmb sin(m phi), which has no singular point and is
what the models differentiate.
"""

import difflib
import math
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .coherence import (
    enough_nodes,
    enough_rings,
    focal_states,
    gaussian_plane,
    mixed_states,
    source_states,
)
from .fourier import ifft, phase_factor
from .grid import Grid
from .zernike import mode_count, tilt_polynomials


# CODATA 2022
PLANCK_TIMES_C = 12398.419843320026  # eV Å
REST_ENERGY = 510998.95069  # eV

Aberrations = dict[str, Float[Array, " scans"]]
"""Cartesian Krivanek coefficients in Å by name (`C10`, `C12a`, `C12b`, ...), one value a scan."""

_ORDERS = tuple((n, m) for n in range(1, 6) for m in range(n + 1, -1, -1) if (n + m) % 2)
CARTESIAN: dict[str, tuple[int, int, str]] = {
    f"C{n}{m}{part}": (n, m, part)
    for n, m in sorted(_ORDERS)
    for part in (("a", "b") if m else ("",))
}
"""Name -> (radial order n, azimuthal order m, part): all 25 coefficients to fifth order."""
POLAR: tuple[str, ...] = tuple(
    name for n, m in sorted(_ORDERS) for name in ([f"C{n}{m}"] + ([f"phi{n}{m}"] if m else []))
)
"""The same 25 numbers as magnitudes C_nm (Å) and angles phi_nm (rad)."""


def wavelength(energy: float) -> float:
    """Relativistic electron wavelength in Å; `energy` in eV (CODATA 2022)."""
    return PLANCK_TIMES_C / math.sqrt(energy * (energy + 2 * REST_ENERGY))


def interaction_parameter(energy: float) -> float:
    """Phase per projected potential, rad/(V Å): sigma = (2 pi/(lambda E)) (mc²+E)/(2mc²+E)."""
    ratio = (REST_ENERGY + energy) / (2 * REST_ENERGY + energy)
    return 2 * math.pi / (wavelength(energy) * energy) * ratio


MOST_NODES = 32
"""Rings or nodes beyond which a width is taken for a mistake."""

FWHM = 2 * math.sqrt(2 * math.log(2))
"""Full width at half maximum of a normal distribution over its standard deviation."""


def chromatic_spread(
    cc_mm: float,
    energy: float,
    energy_spread_ev: float,
    current_ripple: float = 0.0,
    voltage_ripple: float = 0.0,
) -> float:
    """Rms defocus spread in Å of a lens of chromatic aberration `cc_mm`; `energy` in eV.

    `energy_spread_ev` is the full width at half maximum, as microscopes state it; the ripples of
    lens current and high voltage are relative and rms. The result is C_c times the root of the
    squared rms of (dE/E) r, (dV/V) r and 2 dI/I, r = (1 + E/mc²)/(1 + E/2mc²): lenses feel the
    relativistic voltage E (1 + E/2mc²), and their strength goes as current squared over it.
    """
    relativistic = (1 + energy / REST_ENERGY) / (1 + energy / (2 * REST_ENERGY))
    electrons = math.hypot(energy_spread_ev / FWHM / energy, voltage_ripple) * relativistic
    return cc_mm * 1e7 * math.hypot(electrons, 2 * current_ripple)


def cartesian(polar: Mapping[str, float]) -> dict[str, float]:
    """Cartesian coefficients from magnitudes `C_nm` (Å) and angles `phi_nm` (rad).

    **Raises:** ValueError for a name that is not one of `POLAR`, naming the nearest.
    """
    for name in polar:
        if name not in POLAR:
            near = difflib.get_close_matches(name, POLAR, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} is not an aberration coefficient.{hint} Known: {POLAR}.")
    result = {}
    for name, (n, m, part) in CARTESIAN.items():
        if f"C{n}{m}" in polar:
            angle = m * polar.get(f"phi{n}{m}", 0.0)
            result[name] = polar[f"C{n}{m}"] * (math.sin(angle) if part == "b" else math.cos(angle))
    return result


def polar(coefficients: Mapping[str, float]) -> dict[str, float]:
    """Inverse of `cartesian`: magnitudes >= 0 (C_n0 signed), angles in [0, 2 pi/m)."""
    result = {}
    for n, m in sorted({CARTESIAN[name][:2] for name in coefficients}):
        if m == 0:
            result[f"C{n}0"] = float(coefficients[f"C{n}0"])
            continue
        a, b = (float(coefficients.get(f"C{n}{m}{part}", 0.0)) for part in "ab")
        result[f"C{n}{m}"] = math.hypot(a, b)
        result[f"phi{n}{m}"] = math.atan2(b, a) / m % (2 * math.pi / m)
    return result


def _angular_monomial(n: int, m: int, part: str, ky, kx):
    """theta^(n+1) cos or sin(m phi) for k in units of theta: a polynomial, smooth at k = 0."""
    real, imaginary = jnp.ones_like(kx * ky), jnp.zeros_like(kx * ky)
    for _ in range(m):
        real, imaginary = real * kx - imaginary * ky, real * ky + imaginary * kx
    return (imaginary if part == "b" else real) * (kx**2 + ky**2) ** ((n + 1 - m) // 2)


def aberration_phase(
    aberrations: Aberrations, ky: Float[Array, "*shape"], kx: Float[Array, "*shape"], energy: float
) -> Float[Array, "scans *shape"]:
    """chi in rad at spatial frequencies `ky`, `kx` (1/Å), for each scan."""
    lam = wavelength(energy)
    chi = jnp.zeros((), ky.dtype)
    for name, values in aberrations.items():
        n, m, part = CARTESIAN[name]
        surface = _angular_monomial(n, m, part, lam * ky, lam * kx) * (2 * math.pi / lam / (n + 1))
        chi = chi + values.reshape(values.shape + (1,) * surface.ndim) * surface[None]
    return chi


def aberration_shift(
    aberrations: Aberrations, ky: Float[Array, "*shape"], kx: Float[Array, "*shape"], energy: float
) -> Float[Array, "scans *shape 2"]:
    """Gradient of chi/2 pi with respect to (ky, kx): where the ray of each frequency lands, Å.

    Term by term with w = k_x + i k_y: d/dk of Re or Im[w^m] |w|^(2j), in closed form.
    """
    lam = wavelength(energy)
    qy, qx = lam * ky, lam * kx
    total = jnp.zeros((), ky.dtype)
    for name, values in aberrations.items():
        n, m, part = CARTESIAN[name]
        j = (n + 1 - m) // 2
        square = qx**2 + qy**2
        body = _angular_monomial(m - 1, m, part, qy, qx)  # Re or Im[w^m]
        slope_x = slope_y = jnp.zeros_like(body)
        if m:
            cosine = _angular_monomial(m - 2, m - 1, "a", qy, qx)
            sine = _angular_monomial(m - 2, m - 1, "b", qy, qx)
            slope_x, slope_y = (m * cosine, -m * sine) if part == "a" else (m * sine, m * cosine)
        radial = 2 * j * square ** max(j - 1, 0) * body
        gradient = [slope * square**j + radial * q for slope, q in ((slope_y, qy), (slope_x, qx))]
        surface = jnp.stack(gradient, -1) / (n + 1)
        total = total + values.reshape(values.shape + (1,) * surface.ndim) * surface[None]
    return total


def aperture(
    ky: Float[np.ndarray, "ky 1"],
    kx: Float[np.ndarray, "1 kx"],
    cutoff: float | Float[Array, ""],
    soft: bool = True,
) -> Float[np.ndarray, "ky kx"] | Float[Array, "ky kx"]:
    """Amplitude of a round aperture of radius `cutoff` (1/Å) on a grid of frequencies.

    `soft`: each pixel holds the fraction of it inside the edge (the edge taken straight within a
    pixel), so that the area, and with it the intensity, varies smoothly with `cutoff`;
    otherwise 0 or 1.
    """
    radius = np.hypot(ky, kx)
    if not soft:
        return (radius <= cutoff).astype(float)
    step = [abs(k.ravel()[1] - k.ravel()[0]) if k.size > 1 else 0.0 for k in (ky, kx)]
    safe = np.where(radius > 0, radius, 1.0)
    width = np.hypot(step[0] * ky / safe, step[1] * kx / safe)
    width = np.where(width > 0, width, max(*step, 1e-12))
    if isinstance(cutoff, jax.Array):
        radius, width = (jnp.asarray(a, cutoff.dtype) for a in (radius, width))
        return jnp.clip((cutoff - radius) / width + 0.5, 0.0, 1.0)
    return np.clip((cutoff - radius) / width + 0.5, 0.0, 1.0)


class Optics(eqx.Module):
    """The probe-forming lens of every scan of a series.

    `energy` in eV and `semiangle` in mrad are static, since the set of beams depends on them; the
    aberrations are leaves. What makes the probe partially coherent is None where it is off:
    `source`, the rms size of the source's image along each axis (Å); `spread`, the rms of the
    defocus (Å); `probes`, coefficients of the tilt polynomials by which the aperture is multiplied
    in each mode of a mixed state, in any scale. The widths act by their size; at 0 they have no
    slope, so let a refinement start elsewhere. `source_rings` and `spread_nodes` are those of
    `coherence.gaussian_plane` and `coherence.gaussian_line`.
    """

    energy: float = eqx.field(static=True)
    semiangle: float = eqx.field(static=True)
    aberrations: Aberrations
    source: Float[Array, ""] | None = None
    spread: Float[Array, ""] | None = None
    probes: Complex[Array, "probes polynomials"] | None = None
    source_rings: int = eqx.field(static=True, default=1)
    spread_nodes: int = eqx.field(static=True, default=3)

    @property
    def states(self) -> int:
        """Number of incoherent states of the probe, whose intensities add."""
        probes = 1 if self.probes is None else self.probes.shape[0]
        focal = 1 if self.spread is None else self.spread_nodes
        moved = 1 if self.source is None else len(gaussian_plane(self.source_rings)[1])
        return probes * focal * moved

    def of_point(self) -> "Optics":
        """The same lens before a source of no size."""
        return eqx.tree_at(lambda o: o.source, self, None, is_leaf=lambda x: x is None)

    def of_scan(self, scan: Int[Array, ""]) -> "Optics":
        """The optics of one scan alone."""
        return eqx.tree_at(
            lambda o: o.aberrations, self, {k: v[scan][None] for k, v in self.aberrations.items()}
        )

    @property
    def wavelength(self) -> float:
        """Å."""
        return wavelength(self.energy)

    @property
    def cutoff(self) -> float:
        """Radius of the aperture, 1/Å."""
        return self.semiangle * 1e-3 / self.wavelength

    @property
    def depth_of_field(self) -> float:
        """lambda/alpha² in Å, the natural unit of depth."""
        return self.wavelength / (self.semiangle * 1e-3) ** 2

    @property
    def defocus(self) -> Float[Array, " scans"]:
        """Depth at which each scan is focused, Å: -C10."""
        return -self.aberrations["C10"]


def focal_series(
    energy: float,
    semiangle: float,
    defocus: Sequence[float | int] | Float[np.ndarray, " scans"],
    aberrations: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    source: float | int | None = None,
    spread: float | int | None = None,
    probes: Complex[np.ndarray, "probes polynomials"] | None = None,
    source_rings: int | None = None,
    spread_nodes: int | None = None,
) -> Optics:
    """Optics of scans focused at `defocus` (Å).

    `aberrations`: polar coefficients (Å, rad) common to all scans, or one mapping a scan. The
    others are those of `Optics`; rings and nodes that are not given are as many as the widths need
    (`coherence.enough_rings`, `coherence.enough_nodes`).

    **Raises:** ValueError for numbers that make no series, no state or no polynomials.
    """
    count = len(defocus)
    given = aberrations or {}
    each = [given] * count if isinstance(given, Mapping) else list(given)
    if len(each) != count:
        raise ValueError(f"`focal_series`: {count} defoci but aberrations for {len(each)} scans.")
    values: dict[str, np.ndarray] = {"C10": np.zeros(count)}
    for scan, one in enumerate(each):
        for name, value in cartesian(one).items():
            values.setdefault(name, np.zeros(count))[scan] = value
    values["C10"] = values["C10"] - np.asarray(defocus, float)
    cutoff = semiangle * 1e-3 / wavelength(energy)
    _require_widths(source=source, spread=spread)
    if source_rings is None:
        source_rings = enough_rings(float(source or 0), cutoff)
    if spread_nodes is None:
        spread_nodes = enough_nodes(float(spread or 0), wavelength(energy), cutoff)
    _require_states(probes, source_rings=source_rings, spread_nodes=spread_nodes)
    leaf = lambda value: None if value is None else jnp.asarray(value, float)
    return Optics(
        energy,
        semiangle,
        {name: jnp.asarray(v, float) for name, v in values.items()},
        leaf(source),
        leaf(spread),
        None if probes is None else jnp.asarray(probes, complex),
        source_rings,
        spread_nodes,
    )


def _require_widths(**widths: float | int | None) -> None:
    for name, value in widths.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(
                f"`focal_series`: `{name}` is {value} Å; an rms width is 0 or more, None is none."
            )


def _require_states(probes, **counts: int) -> None:
    for name, count in counts.items():
        if not 1 <= count <= MOST_NODES:
            raise ValueError(
                f"`focal_series`: `{name}` = {count} must lie between 1 and {MOST_NODES}; a width "
                "that needs more leaves no contrast."
            )
    if probes is not None:
        _order_of(probes.shape[1])


def _order_of(polynomials: int) -> int:
    """The radial order that `polynomials` polynomials make complete."""
    order = (math.isqrt(8 * polynomials + 1) - 3) // 2
    if mode_count(order) != polynomials:
        raise ValueError(
            f"`Optics.probes` has {polynomials} polynomials; a whole radial order has "
            f"{mode_count(order)} or {mode_count(order + 1)}."
        )
    return order


def pupil(
    optics: Optics,
    ky: Float[Array, "*shape"],
    kx: Float[Array, "*shape"],
    amplitude: Float[Array, "*shape"] | None = None,
) -> Complex[Array, "scans states *shape"]:
    """What the lens multiplies each frequency by, for every incoherent state of the probe.

    The states' mean squares add up to 1 where the aperture is open: for a mixed state on average
    over the disc, or, given the `amplitude` of the aperture at these frequencies, over them.
    """
    chi = aberration_phase(optics.aberrations, ky, kx, optics.energy)
    wave = phase_factor(-chi)[:, None]
    factors = []
    if optics.probes is not None:
        order = _order_of(optics.probes.shape[1])
        polynomials = tilt_polynomials(order, jnp.stack([ky, kx], -1), optics.cutoff)
        weight = None if amplitude is None else amplitude**2
        factors.append(mixed_states(optics.probes, jnp.asarray(polynomials), weight))
    if optics.spread is not None:
        square = ky**2 + kx**2
        nodes = optics.spread_nodes
        factors.append(focal_states(optics.spread, nodes, optics.wavelength, square))
    if optics.source is not None:
        factors.append(source_states(optics.source, optics.source_rings, ky, kx))
    for states in factors:
        wave = wave[:, :, None] * states[None, None]
        wave = wave.reshape(wave.shape[0], -1, *ky.shape)
    return wave


def probe(
    optics: Optics, grid: Grid, position: Float[Array, "2"]
) -> Complex[Array, "scans states y x"]:
    """The probe of each scan at `position` (y, x) Å on a periodic `grid`, total intensity 1."""
    spectrum = spectra(optics, grid, position.dtype)
    ky, kx = (jnp.asarray(k, position.dtype) for k in grid.frequencies())
    ramp = phase_factor(-2 * math.pi * (ky * position[0] + kx * position[1]))
    return ifft(spectrum * ramp[None, None])


def spectra(
    optics: Optics, grid: Grid, dtype: jax.typing.DTypeLike = float, soft: bool = True
) -> Complex[Array, "scans states ky kx"]:
    """Spectra of the probe of each scan at the origin of a periodic `grid`, total intensity 1.

    `soft` is that of `aperture`.
    """
    frequencies = grid.frequencies()
    amplitude = aperture(*frequencies, optics.cutoff, soft)
    amplitude = jnp.asarray(amplitude / np.linalg.norm(amplitude), dtype)
    ky, kx = (jnp.asarray(k, dtype) for k in np.broadcast_arrays(*frequencies))
    wave = pupil(optics, ky, kx, amplitude)
    return wave * amplitude.astype(wave.dtype)[None, None]
