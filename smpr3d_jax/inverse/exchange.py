"""Reconstructions of other packages as models of ours, and ours as theirs.

`data.interchange` reads and writes their files; here its record becomes a `Scattering` with
`ObjectSlices` that predicts the same frames, and can be reconstructed further, and back.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..data.interchange.record import Exchange
from ..physics.detector import Detector
from ..physics.forward import Scattering
from ..physics.grid import Grid
from ..physics.optics import focal_series, polar
from ..physics.ptychography import Illumination, ObjectSlices
from ..physics.scan import Scan


def model_of(
    exchange: Exchange,
    semiangle: float | None = None,
    dtype: jax.typing.DTypeLike = np.float32,
) -> Scattering:
    """A model that predicts the frames of `interchange.patterns(exchange)`, the zero in the corner.

    `semiangle` (mrad) where the record has none. Vacuum is put around an object that some windows
    leave.

    **Raises:** ValueError where nobody says the semi-angle, or the detector's pixels, of
    wavelength/(n sampling), are not square.
    """
    angle = exchange.semiangle if semiangle is None else semiangle
    if angle is None:
        raise ValueError("`model_of`: the record has no semi-angle; give `semiangle` in mrad.")
    shape = (exchange.probes.shape[1], exchange.probes.shape[2])
    pixels = [1e3 * exchange.wavelength / (n * d) for n, d in zip(shape, exchange.sampling,
                                                                 strict=True)]  # fmt: skip
    if not np.isclose(*pixels, rtol=1e-4):
        raise ValueError(
            f"`model_of`: detector pixels of {pixels[0]:.5g} x {pixels[1]:.5g} mrad (y, x) are not "
            "square; resample the probe's window first."
        )
    plates, origin = _with_room(exchange, shape)
    real, kind = np.dtype(dtype), np.result_type(dtype, np.complex64)
    tilt = exchange.tilts[0] if len(exchange.tilts) == 1 else exchange.tilts
    specimen = ObjectSlices(
        jnp.asarray(plates, kind), jnp.asarray(exchange.depths, real), jnp.asarray(tilt, real),
        jnp.asarray(exchange.weights, real),
        Grid((plates.shape[2], plates.shape[3]), exchange.sampling), origin,
        band_limit=exchange.band_limit,
    )  # fmt: skip
    others = {k: v for k, v in exchange.aberrations.items() if k != "C10"}
    optics = focal_series(exchange.energy, angle, [-exchange.aberrations.get("C10", 0.0)], others)
    frames = len(exchange.positions)
    scan = Scan(jnp.asarray(exchange.positions, real), jnp.zeros(frames, jnp.int32))
    dose = jnp.asarray([np.sum(np.abs(exchange.probes) ** 2)], real)
    light = Illumination(jnp.asarray(exchange.probes[None], kind))
    detector = Detector(shape, float(np.mean(pixels)), integration=1)
    return Scattering(optics, specimen, scan, detector, dose, illumination=light)


def _with_room(exchange: Exchange, shape: tuple[int, int]):
    """The object with vacuum around it as far as windows reach, and its origin."""
    corners = np.floor(exchange.corners + 0.501).astype(int)
    size = np.array(exchange.transmission.shape[2:])
    low = np.maximum(0, 1 - corners.min(axis=0))
    high = np.maximum(0, corners.max(axis=0) + shape + 1 - size)
    pad = [(0, 0), (0, 0), *zip(low.tolist(), high.tolist(), strict=True)]
    plates = np.pad(exchange.transmission, pad, constant_values=1)
    y, x = (o - n * d for o, n, d in zip(exchange.origin, low, exchange.sampling, strict=True))
    return plates, (float(y), float(x))


def exchange_of(model: Scattering, scan: int = 0) -> Exchange:
    """What other packages are told of one scan of a model, from its first frame's position.

    The last slice is as thick as the one before it (0 where it is alone).

    **Raises:** ValueError for a model without slices or a probe in pixels, or one whose probe
    changes from frame to frame, which no file of theirs can hold.
    """
    specimen, light = model.specimen, model.illumination
    if not isinstance(specimen, ObjectSlices) or light is None:
        raise ValueError("`exchange_of` needs `ObjectSlices` lit by an `illumination` in pixels.")
    if light.variations is not None:
        raise ValueError(
            "`exchange_of`: this probe changes from frame to frame, which the files of other "
            "packages cannot hold; set `illumination.variations` and `weights` to None."
        )
    own = np.flatnonzero(np.asarray(model.scan.series) == scan)
    positions = np.asarray(model.scan.positions, float)[own]
    depths = np.asarray(specimen.depths, float)
    gaps = np.diff(depths)
    tilts = np.atleast_2d(np.asarray(specimen.tilt, float))
    coefficients = {name: float(values[scan]) for name, values in model.optics.aberrations.items()}
    return Exchange(
        energy=model.optics.energy, sampling=specimen.grid.sampling,
        transmission=np.asarray(specimen.transmission(model.optics.energy)),
        thicknesses=np.append(gaps, gaps[-1] if len(gaps) else 0.0),
        origin=tuple(np.subtract(specimen.origin, positions[0]).tolist()),
        probes=np.asarray(light.modes[scan]), positions=positions - positions[0],
        weights=np.asarray(specimen.shares, float),
        tilts=tilts if len(tilts) == 1 else tilts[own],
        semiangle=model.optics.semiangle, aberrations=polar(coefficients),
        band_limit=specimen.band_limit,
    )  # fmt: skip
