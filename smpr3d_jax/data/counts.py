"""Counted electrons, dense or sparse, and how they are compared with a model.

`Frames` and `Events` are two ways to store the same thing: the electrons that fell on each pixel of
each frame, kept in the integer type they came in. Both have `len`, `[index]`, `dense`, `total` and
`frame_shape`, and nothing outside this file needs to know which one it holds. A noise model is a
function `(intensity, count) -> float` of one pixel; `compare` lifts it exactly over either.

On disk the zero frequency is in the centre of a frame (index n//2), inside it is in the corner:
`to_corner` is called once, at loading.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Integer, Num, Real


class InputError(ValueError):
    """Something the user gave, a file or a setting, cannot be used; the message says what would."""


Index = Integer[Array, " batch"] | Integer[np.ndarray, " batch"] | slice
"""Which frames: a slice or an array of frame numbers."""


def _rows(
    values: Num[Array | np.ndarray, "frames ..."], index: Index
) -> Num[Array | np.ndarray, "rows ..."]:
    if not isinstance(index, slice) and np.ndim(index) != 1:
        raise ValueError(
            f"Counts are indexed by a slice or by an array of frame numbers, got {index!r}; "
            "write counts[i : i + 1] for one frame."
        )
    if isinstance(index, slice):
        return values[index]
    if isinstance(values, np.ndarray):
        return values[np.asarray(index)]
    return _taken(values, jnp.asarray(index))


@jax.jit
def _taken(values, rows):
    return values[rows]


class Frames(eqx.Module):
    """Every pixel of every frame, in the stored type (uint8, uint16, ...); in numpy on the host."""

    values: Real[Array | np.ndarray, "frames ky kx"]

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index: Index) -> "Frames":
        return Frames(_rows(self.values, index))

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Pixels (ky, kx) of one frame."""
        ky, kx = self.values.shape[1:]
        return ky, kx

    def dense(self, dtype: DTypeLike = float) -> Num[Array, "frames ky kx"]:
        """The counts as an array of `dtype`; decode inside the compiled step."""
        return jnp.asarray(self.values).astype(dtype)

    def total(self) -> Float[Array, " frames"]:
        """Electrons of each frame."""
        return jnp.sum(self.values, axis=(1, 2)).astype(float)


class Events(eqx.Module):
    """The pixels that were hit, frame by frame, padded to the longest frame.

    `pixels` are flat indices row·kx + column, each at most once a frame; `multiplicity` says how
    many electrons fell there. A padded hit has multiplicity 0 and points at pixel 0: it counts
    nothing.
    """

    pixels: Int32[Array, "frames hits"]
    multiplicity: Integer[Array, "frames hits"]
    shape: tuple[int, int] = eqx.field(static=True)

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, index: Index) -> "Events":
        pixels, multiplicity = (_rows(a, index) for a in (self.pixels, self.multiplicity))
        return Events(jnp.asarray(pixels), jnp.asarray(multiplicity), self.shape)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Pixels (ky, kx) of one frame."""
        return self.shape

    def dense(self, dtype: DTypeLike = float) -> Num[Array, "frames ky kx"]:
        """The counts as an array of `dtype`; decode inside the compiled step."""
        ky, kx = self.shape
        frame = jnp.arange(len(self), dtype=jnp.int32)[:, None]
        flat = jnp.zeros((len(self), ky * kx), dtype)
        flat = flat.at[frame, self.pixels].add(self.multiplicity.astype(dtype))
        return flat.reshape(len(self), ky, kx)

    def total(self) -> Float[Array, " frames"]:
        """Electrons of each frame."""
        return jnp.sum(self.multiplicity, axis=1).astype(float)


Counts = Frames | Events
"""Counted electrons, however they are stored."""


def compare(
    noise: Callable[[Float[Array, ""], Float[Array, ""]], Float[Array, ""]],
    intensity: Float[Array, "frames ky kx"],
    counts: Counts,
    mask: Bool[Array, "ky kx"] | None = None,
) -> Float[Array, " frames"]:
    """Sum of `noise(intensity, count)` over the pixels of each frame at which `mask` is True.

    Over events it is the sum of l(I, 0) over all pixels plus that of l(I, n) - l(I, 0) over the
    pixels that were hit: the same number, without a dense frame of counts. What masked pixels hold
    is of no influence, not even if it is no number.
    """
    frames = intensity.shape[0]
    flat = intensity.reshape(frames, -1)
    seen = None if mask is None else mask.reshape(1, -1)
    # Where a derivative is not asked for it must be finite all the same.
    flat = only(flat, seen, 1)
    lifted = jax.vmap(jax.vmap(noise))
    if isinstance(counts, Frames):
        count = only(counts.dense(flat.dtype).reshape(flat.shape), seen, 1)
        return jnp.sum(only(lifted(flat, count), seen), axis=1)
    hit = jnp.take_along_axis(flat, counts.pixels, axis=1)
    n = counts.multiplicity.astype(flat.dtype)
    n = n if seen is None else only(n, seen[0][counts.pixels])
    extra = lifted(hit, n) - lifted(hit, jnp.zeros_like(n))
    # `where`, because two compiled evaluations of l(I, 0) may differ in their last bit.
    extra = jnp.where(n > 0, extra, jnp.zeros_like(extra))
    dark = only(lifted(flat, jnp.zeros_like(flat)), seen)
    return jnp.sum(dark, axis=1) + jnp.sum(extra, axis=1)


def only(
    values: Num[Array, "*shape"], mask: Bool[Array, "*mask"] | None, instead: int = 0
) -> Num[Array, "*shape"]:
    """`values` where `mask` is True, `instead` elsewhere; without a mask the values themselves."""
    return values if mask is None else jnp.where(mask, values, jnp.full_like(values, instead))


def join(counts: Sequence[Counts]) -> Counts:
    """All frames of several counts, one after the other.

    Events are padded to the longest frame; next to dense frames they become dense.

    **Raises:** InputError if there is nothing to join or the frames differ in shape.
    """
    shapes = [c.frame_shape for c in counts]
    if len(set(shapes)) != 1:
        raise InputError(
            f"Counts can be joined only if there are some and their frames have one shape, got "
            f"{shapes}; crop them to a common window first."
        )
    events = [c for c in counts if isinstance(c, Events)]
    if len(events) < len(counts):
        values = [
            c.values if isinstance(c, Frames) else c.dense(c.multiplicity.dtype) for c in counts
        ]
        dtype = np.result_type(*(v.dtype for v in values))
        return Frames(jnp.concatenate([v.astype(dtype) for v in values]))
    hits = max(e.pixels.shape[1] for e in events)
    dtype = np.result_type(*(e.multiplicity.dtype for e in events))
    pad = lambda a: jnp.pad(a, ((0, 0), (0, hits - a.shape[1])))
    return Events(
        jnp.concatenate([pad(e.pixels) for e in events]),
        jnp.concatenate([pad(e.multiplicity.astype(dtype)) for e in events]),
        shapes[0],
    )


def events_from_csr(
    indptr: Integer[np.ndarray, " frames_and_one"],
    pixels: Integer[np.ndarray, " events"],
    shape: tuple[int, int],
    multiplicity: Integer[np.ndarray, " events"] | None = None,
) -> Events:
    """Events from compressed rows: frame i hit `pixels[indptr[i]:indptr[i + 1]]`.

    Repeated pixels are merged; the multiplicity takes the smallest unsigned type that holds it.

    **Raises:** InputError for a pixel outside the frame.
    """
    size = shape[0] * shape[1]
    indptr = indptr.astype(np.int64)
    outside = np.flatnonzero((pixels < 0) | (pixels >= size))
    if len(outside):
        frame = np.searchsorted(indptr, outside[0], side="right") - 1
        raise InputError(
            f"event index {pixels[outside[0]]} in frame {frame} is outside a frame of "
            f"{shape[0]} × {shape[1]} pixels (0 to {size - 1}); {len(outside)} events are. "
            "Give the shape (ky, kx) with which the events were numbered."
        )
    return _padded(*merged(indptr, pixels, multiplicity), shape)


def merged(
    indptr: Integer[np.ndarray, " frames_and_one"],
    pixels: Integer[np.ndarray, " events"],
    number: Integer[np.ndarray, " events"] | None = None,
) -> tuple[
    Integer[np.ndarray, " frames_and_one"],
    Integer[np.ndarray, " hits"],
    Integer[np.ndarray, " hits"],
]:
    """Rows with each pixel once and in ascending order, and its electrons (default: 1 an entry).

    The numbers take the smallest unsigned type that holds them, none of them is 0.
    """
    inner = indptr[(indptr > 0) & (indptr < len(pixels))]
    new = np.ones(len(pixels), bool)
    new[1:] = pixels[1:] > pixels[:-1]
    new[inner] = True
    if new.all() and number is None:
        return indptr, pixels, np.ones(len(pixels), np.uint8)
    if not new.all():
        pixels, number = _sorted_rows(indptr, pixels, number)
        new[1:] = pixels[1:] != pixels[:-1]
        new[inner] = True
    first = np.flatnonzero(new)
    if number is None:
        n = np.diff(np.append(first, len(new)))
    else:
        n = np.add.reduceat(number, first, dtype=np.int64) if len(first) else number
    indptr, pixels, some = np.append(0, np.cumsum(new))[indptr], pixels[first], n > 0
    if not some.all():
        indptr, pixels, n = np.append(0, np.cumsum(some))[indptr], pixels[some], n[some]
    return indptr, pixels, n.astype(np.min_scalar_type(int(n.max(initial=0))))


def _sorted_rows(indptr, pixels, number):
    """Pixels, and their numbers if there are any, in ascending order in each row."""
    lengths = np.diff(indptr)
    width = int(lengths.max())
    if number is None and len(lengths) * width < 4 * len(pixels):
        # A rectangle of short rows is sorted ten times faster than one long row of keys.
        inside = np.arange(width) < lengths[:, None]
        table = np.full(inside.shape, np.iinfo(pixels.dtype).max, pixels.dtype)
        table[inside] = pixels
        return np.sort(table, axis=1)[inside], None
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((pixels, owner))
    return pixels[order], None if number is None else number[order]


def _padded(
    indptr: Integer[np.ndarray, " frames_and_one"],
    pixel: Integer[np.ndarray, " hits"],
    n: Integer[np.ndarray, " hits"],
    shape: tuple[int, int],
) -> Events:
    """Rows of hits filled up with zeros to the longest."""
    per_frame = np.diff(indptr)
    inside = np.arange(max(1, per_frame.max(initial=0))) < per_frame[:, None]
    pixels, multiplicity = np.zeros(inside.shape, np.int32), np.zeros(inside.shape, n.dtype)
    pixels[inside], multiplicity[inside] = pixel, n
    return Events(jnp.asarray(pixels), jnp.asarray(multiplicity), shape)


def events_from_frames(frames: Frames) -> Events:
    """The same electrons as events.

    **Raises:** InputError unless every count is a whole number and none is negative.
    """
    values = whole(frames).reshape(len(frames), -1)
    owner, pixel = np.nonzero(values)
    n = values[owner, pixel].astype(np.int64)
    limits = np.append(0, np.cumsum(np.bincount(owner, minlength=len(frames))))
    number = n.astype(np.min_scalar_type(int(n.max(initial=0))))
    return _padded(limits, pixel, number, frames.frame_shape)


def whole(frames: Frames) -> Real[np.ndarray, "frames ky kx"]:
    """The counts in numpy.

    **Raises:** InputError unless every count is a whole number and none is negative.
    """
    values = np.asarray(frames.values)
    fractions = values.dtype.kind == "f" and not np.array_equal(values, np.floor(values))
    if fractions or values.min(initial=0) < 0:
        raise InputError(
            f"Events need whole, non-negative counts; these {values.dtype} frames have others "
            f"(smallest {values.min()}). Keep them dense, or count the electrons first."
        )
    return values


def thin(
    counts: Counts, fraction: float, seed: int | np.random.SeedSequence
) -> tuple[Counts, Counts]:
    """Two independent recordings out of one: each electron goes to the first with `fraction`.

    If the counts are Poisson distributed with mean I, so are both parts, with means fraction I and
    (1 - fraction) I, independently of each other; their sum is the counts. Storage and integer
    type stay, and so does the padding of events: parts drawn from other seeds have the same shape.

    **Raises:** InputError for a `fraction` outside 0 to 1, or counts that are not whole numbers.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"`thin`: `fraction` must lie between 0 and 1, got {fraction}.")
    stored = np.asarray(counts.values if isinstance(counts, Frames) else counts.multiplicity)
    whole = np.issubdtype(stored.dtype, np.integer) or np.array_equal(stored, np.floor(stored))
    if not whole or stored.min(initial=0) < 0:
        raise InputError(
            f"`thin` divides whole electrons between two parts; these {stored.dtype} counts are "
            f"not whole or are negative (smallest {stored.min()}). Count the electrons first."
        )
    rng, kept = np.random.default_rng(seed), np.empty_like(stored)
    # Frame by frame, because numpy counts in eight bytes.
    for frame, number in enumerate(stored):
        kept[frame] = rng.binomial(number.astype(np.int64), fraction)
    first, second = (_recounted(counts, part) for part in (kept, stored - kept))
    return first, second


def _recounted(counts: Counts, number: Num[np.ndarray, "frames ..."]) -> Counts:
    """The same pixels with other numbers of electrons."""
    if isinstance(counts, Frames):
        return Frames(jnp.asarray(number))
    pixels = np.where(number > 0, np.asarray(counts.pixels), 0)
    return Events(jnp.asarray(pixels), jnp.asarray(number), counts.shape)


def window(
    size: tuple[int, int],
    shape: tuple[int, int] | None = None,
    center: tuple[int, int] | None = None,
) -> tuple[slice, slice]:
    """The pixels (y, x) of the window of `shape` around the pixel `center`, as `crop` takes them.

    **Raises:** InputError if it does not fit into a frame of `size`.
    """
    cy, cx = center or (size[0] // 2, size[1] // 2)
    ky, kx = shape or (None, None)
    return _span(size[0], cy, ky), _span(size[1], cx, kx)


def _span(size: int, center: int, window: int | None) -> slice:
    """The `window` pixels (default: as many as there are) with `center` at their index n//2."""
    if window is None:
        window = max(2 * min(center, size - center), 2 * min(center, size - 1 - center) + 1)
    start = center - window // 2
    if window < 1 or start < 0 or start + window > size:
        raise InputError(
            f"A window of {window} pixels around pixel {center} does not fit into the {size} "
            "pixels of the frame; choose a smaller window or check the centre."
        )
    return slice(start, start + window)


def crop(
    counts: Counts,
    shape: tuple[int, int] | None = None,
    center: tuple[int, int] | None = None,
) -> Counts:
    """The window of `shape` (ky, kx) around the pixel `center` (y, x), which comes to index n//2.

    By default the centre is n//2 and the window the largest one around it. For loading, outside a
    compiled function: events outside the window are dropped and the padding with them.

    **Raises:** InputError if the window does not fit into the frame.
    """
    size = counts.frame_shape
    y, x = window(size, shape, center)
    inside = (y.stop - y.start, x.stop - x.start)
    if inside == size:
        return counts
    if isinstance(counts, Frames):
        return Frames(counts.values[:, y, x])
    pixels, n = np.asarray(counts.pixels), np.asarray(counts.multiplicity)
    row, column = np.divmod(pixels, size[1])
    kept = (n > 0) & (row >= y.start) & (row < y.stop) & (column >= x.start) & (column < x.stop)
    moved = (row - y.start) * inside[1] + column - x.start
    limits = np.append(0, np.cumsum(np.count_nonzero(kept, axis=1)))
    return _padded(*merged(limits, moved[kept], n[kept]), inside)


def to_corner(counts: Counts, center: tuple[int, int] | None = None) -> Counts:
    """Bring the zero frequency from the pixel `center` (y, x), default n//2, to index 0.

    Where the centre is not at n//2 the frames are first cropped to the largest window around it:
    a frame rolled as it is would show one edge at the frequencies of the other.

    **Raises:** InputError if the centre is outside the frame.
    """
    counts = crop(counts, None, center)
    ky, kx = counts.frame_shape
    if isinstance(counts, Frames):
        return Frames(jnp.roll(counts.values, (-(ky // 2), -(kx // 2)), axis=(1, 2)))
    row, column = counts.pixels // kx, counts.pixels % kx
    moved = (row - ky // 2) % ky * kx + (column - kx // 2) % kx
    # Padding stays at pixel 0.
    moved = jnp.where(counts.multiplicity > 0, moved, jnp.zeros_like(moved))
    return Events(moved, counts.multiplicity, counts.shape)
