"""The expected intensity at the pixels that electrons hit, without the pattern around them.

The sum over all pixels is that of |psi|² over the window (Parseval: the transform is unitary, and
boxes that share their borders on a periodic axis keep the sum). At a hit the intensity is the
weighted sum of |F|² over the samples within its pixel, as in `detector.intensity`. Four exact ways
lead to it; what each keeps for the reverse pass, beside the waves, is what its memory grows with:

- `pattern`: all pixels, then a look-up; the reverse pass computes it again, so nothing is kept.
- `fft`: the finer pattern by f² transforms; the samples at hits are kept.
- `lines`: f transforms along y, and a sum over x at the hits alone; the samples are kept.
- `dft`: sums over y and x at the hits alone, so that no finer pattern exists at all.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Complex, Float, Int32

from .detector import Detector
from .fourier import EXACT, fft


KEPT = "samples at hits"
"""What survives until the reverse pass."""


def pattern_at(
    exit_waves: Complex[Array, "frames states y x"],
    pixels: Int32[Array, "frames hits"],
    integration: int = 1,
    offset: tuple[float, float] = (0.0, 0.0),
    method: str = "auto",
    shape: tuple[int, int] | None = None,
) -> tuple[Float[Array, " frames"], Float[Array, "frames hits"]]:
    """Expected electrons of each frame, and at each of its flat `pixels`, summed over states.

    Zero frequency in the corner; `integration` and `offset` (pixels) as in `Detector`, of whose
    `shape` (default: the window's) waves fill the window, or the f times wider one. `method`
    "auto" takes the cheapest by `costs`; all give the same numbers. On a CPU frame follows frame,
    so that only one finer pattern exists at a time; accelerators take the frames together.

    **Raises:** ValueError for a method that does not exist or an integration below 1.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(
            f"`pattern_at`: no method is called {method!r}; choose one of auto, "
            f"{', '.join(METHODS)}."
        )
    if integration < 1:
        raise ValueError(f"`pattern_at`: integration {integration} must be a whole number from 1.")
    camera = shape or (exit_waves.shape[2], exit_waves.shape[3])
    wide = exit_waves.shape[2:] != camera
    if method == "auto":
        price = costs(camera, pixels.shape[1], integration, wide)
        method = min(price, key=lambda name: price[name])
    at_hits = partial(METHODS[method], integration, offset, camera)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    def frame(wave, pixels):
        return jnp.sum(wave.real**2 + wave.imag**2), at_hits(wave, pixels)

    return jax.lax.platform_dependent(
        exit_waves,
        pixels,
        cpu=lambda waves, pixels: jax.lax.map(lambda pair: frame(*pair), (waves, pixels)),
        default=jax.vmap(frame),
    )


def costs(
    shape: tuple[int, int], hits: int, integration: int, wide: bool = False
) -> dict[str, float]:
    """Time of value and gradient by each method, per frame and state, in samples transformed.

    A sample of an FFT costs 1 each way whatever its length (5 ns on one core of a server), a term
    of a matrix product 0.06, a term of a sum at a hit 0.2, and fetching a sample 1.5. Measured on
    CPUs for complex64, windows of 50 to 256 pixels, f = 1 and 2, 5 to 2000 hits, and right to a
    factor of 1.6 there; `benchmarks/events.py` compares the methods.
    """
    f, (ny, nx) = integration, shape
    along = 2 * (f // 2) + 1
    samples = hits * along**2
    rows, columns = (f * ny, f * nx) if wide else (ny, nx)
    sums = 2 * 0.2 * samples * columns
    return {
        "pattern": 3.0 * f**2 * ny * nx,
        "fft": 2.0 * f**2 * ny * nx + 2 * 1.5 * samples,
        "lines": 2.0 * f * ny * columns + sums,
        "dft": 2 * 0.06 * hits * along * rows * columns + sums,
    }


def _from_pattern(f, offset, camera, wave, pixels):
    pattern = Detector(camera, 1.0, f, offset)(wave)
    return jnp.sum(pattern, axis=0).reshape(-1)[pixels]


def _from_fft(f, offset, camera, wave, pixels):
    (ny, nx), (rows, columns) = camera, wave.shape[1:]
    ramps = [
        _phases(m, n, np.arange(f * n // m) / f, o) / math.sqrt(f * n // m)
        for m, n, o in zip((rows, columns), camera, offset, strict=True)
    ]
    shift = jnp.asarray(ramps[0][:, None, :, None] * ramps[1][:, None, :], wave.dtype)
    fine = fft(wave[:, None, None] * shift[None]).reshape(wave.shape[0], -1)
    y, x = _samples(f, pixels // nx, ny), _samples(f, pixels % nx, nx)
    # Samples come in combs, one for each ramp.
    (cy, iy), (cx, ix) = _comb(y, f * ny // rows), _comb(x, f * nx // columns)
    place = ((cy * (f * nx // columns))[:, :, None] + cx[:, None, :]) * (rows * columns)
    place = place + (iy * columns)[:, :, None] + ix[:, None, :]
    return _power(f, fine[:, place])


def _comb(sample, combs: int):
    """In which comb a sample is, and where in it."""
    return sample % combs, sample // combs


def _from_lines(f, offset, camera, wave, pixels):
    (ny, nx), (states, rows, columns) = camera, wave.shape
    combs = f * ny // rows
    ramp = _phases(rows, ny, np.arange(combs) / f, offset[0]) / math.sqrt(combs)
    # The analysis of `fourier`, of one axis.
    ramped = wave[:, None] * jnp.asarray(ramp, wave.dtype)[None, :, :, None]
    fine = jnp.fft.fft(ramped, axis=2, norm="ortho")
    comb, place = _comb(_samples(f, pixels // nx, ny), combs)
    lines = fine.reshape(states, f * ny, columns)[:, comb * rows + place]
    across = _waves_at(f, offset[1], pixels % nx, columns, nx, wave.dtype)
    return _power(f, jnp.sum(lines[:, :, :, None] * across[None, :, None], axis=-1))


def _from_dft(f, offset, camera, wave, pixels):
    (ny, nx), (rows, columns) = camera, wave.shape[1:]
    along = _waves_at(f, offset[0], pixels // nx, rows, ny, wave.dtype)
    across = _waves_at(f, offset[1], pixels % nx, columns, nx, wave.dtype)
    lines = jnp.einsum("hjy,syx->shjx", along, wave, precision=EXACT)
    return _power(f, jnp.sum(lines[:, :, :, None] * across[None, :, None], axis=-1))


METHODS: dict[str, Callable[..., Float[Array, " hits"]]] = {
    "pattern": _from_pattern,
    "fft": _from_fft,
    "lines": _from_lines,
    "dft": _from_dft,
}


def _phases(count: int, n: int, k, offset: float):
    """exp(-2 pi i (k - offset) r/n) of the `count` pixels r of a window: rows for each of `k`."""
    turns = np.outer(k - offset, np.arange(count) / n)
    return np.exp(-2j * np.pi * turns)


def _waves_at(f: int, offset: float, k, count: int, n: int, dtype):
    """The analysing waves of the samples at pixels `k` of an axis: hits, samples, r.

    Rows of one table for all frames, as large as f waves: computed on the host in float64.
    """
    table = _phases(count, n, np.arange(f * n) / f, offset) / math.sqrt(f * n)
    return jnp.asarray(table, dtype)[_samples(f, k, n)]


def _samples(f: int, k, n: int):
    """The samples within pixels `k` on the f times finer axis, that on each border included."""
    within = jnp.arange(-(f // 2), f // 2 + 1, dtype=jnp.int32)
    return (f * k[:, None] + within[None]) % (f * n)


def _power(f: int, samples):
    """Sum over states and over the samples (states, hits, y, x) within each pixel."""
    # Names hold real arrays only.
    real, imag = (checkpoint_name(part, KEPT) for part in (samples.real, samples.imag))
    weight = np.where(2 * np.abs(np.arange(-(f // 2), f // 2 + 1)) == f, 0.5, 1.0)
    weight = jnp.asarray(np.outer(weight, weight), real.dtype)
    power = jnp.sum(real**2 + imag**2, axis=0)
    return jnp.sum(power * weight[None], axis=(1, 2))
