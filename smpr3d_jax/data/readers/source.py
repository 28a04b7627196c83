"""What a reader hands over: a description of the data, and a way to read some of it.

A reader is a module with two functions: `recognises(path) -> bool` looks inside the file,
`open_source(path, **hints) -> Source` reads the description and no frames. A source's `load`
takes flat positions (row after row of the scan) and answers with a numpy array of frames, or with
`EventRows`; the zero frequency is where the file has it. The hints that every reader knows:
`dataset`, `scan_shape` (slow, fast), `frame_shape` (ky, kx).
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped

from ..counts import Counts, Frames, InputError
from ..electrons import masked
from ..events import EventRows, to_events


Positions = Int[np.ndarray, " frames"]
"""Flat numbers of scan positions, row after row."""
Load = Callable[[Positions], Any]
"""Positions -> array of frames, or EventRows."""


class Tiles(NamedTuple):
    """Pieces of `rows` × `columns` positions each, on a raster that has `across` of them in a row.

    Their frames share what can only be read as a whole. The raster is the file's, whose first piece
    begins at position 0; the scan may be told to have rows of another length.
    """

    rows: int
    columns: int
    across: int

    @property
    def consecutive(self) -> int:
        """Of how many consecutive positions the pieces are read together."""
        return self.columns if self.rows == 1 else self.rows * self.across

    def fitting(self, frames: float) -> "Tiles":
        """The same, or pieces of at most `frames` positions where these have more."""
        columns = max(1, min(self.columns, int(frames / self.rows)))
        return Tiles(max(1, min(self.rows, int(frames / columns))), columns, self.across)

    def groups(self, count: int, frames: float) -> Iterator[Positions]:
        """`count` positions in groups of whole pieces, of about `frames` positions."""
        rows, columns, across = self
        columns = min(across, columns * max(1, int(frames / (rows * columns))))
        if columns == across:
            rows *= max(1, int(frames / (rows * columns)))
        for top in range(0, -(-count // across), rows):
            for left in range(0, across, columns):
                y = np.arange(top, top + rows)[:, None]
                x = np.arange(left, min(left + columns, across))
                group = (y * across + x).ravel()
                if len(group := group[group < count]):
                    yield group


@dataclasses.dataclass(frozen=True)
class Source:
    """One scan in one file, described and not yet read.

    `facts` holds what the file says about the experiment, in our units, and nothing else:
    `scan_step_A` and `detector_pixel_mrad` or `detector_pixel_inv_A` (each (y, x)), `center` (y, x)
    in pixels, `rotation_deg`, `transpose`, `energy_ev`, `semiangle_mrad`, `semiangle_pixels`.
    `counts_per_electron`, `defocus_A`, `exposure_s` (of a frame). `notes` says what in the file
    deserves a second look; `mask` is False at the pixels that the file declares unusable, which
    `usable` and `read` leave out. `frame_bytes` is what a frame takes in memory, on average, if
    that is not its pixels times the size of `dtype`; `together` says which frames are stored in
    pieces that are read as a whole: tiles of the scan, or runs of as many, None if not known.
    """

    path: pathlib.Path
    format: str
    dataset: str
    scan_shape: tuple[int, int]
    frame_shape: tuple[int, int]
    dtype: np.dtype
    kind: Literal["dense", "events"]
    load: Load
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mask: Bool[np.ndarray, "ky kx"] | None = None
    frame_bytes: float | None = None
    together: int | Tiles | None = None

    def __len__(self) -> int:
        return math.prod(self.scan_shape)

    def __str__(self) -> str:
        return f"{self.path}, dataset {self.dataset!r}"

    def read(self, index: Integer[np.ndarray, " frames"] | slice | None = None) -> Counts:
        """The counts at flat scan positions (default: all), zero frequency where the file has it.

        Pixels that may not be used read 0.

        **Raises:** InputError for a position outside the scan, a count that is negative or not a
        number, or an event outside the frame.
        """
        counts = self.usable(index)
        if isinstance(counts, EventRows):
            return to_events(counts)
        positions = self.positions(index)
        values = np.asarray(counts.values)
        for what, found in faults(values).items():
            if what in UNUSABLE:
                self.complain(what, positions[found])
        return Frames(jnp.asarray(_storable(values, self)))

    def host(
        self, index: Integer[np.ndarray, " frames"] | slice | None = None
    ) -> Frames | EventRows:
        """The counts at flat scan positions in numpy, as the file stores them and unchecked.

        **Raises:** InputError for a position outside the scan, or an event outside the frame.
        """
        try:
            data = self.load(self.positions(index))
        except InputError as error:
            named = str(self.path) in str(error)
            raise error if named else InputError(f"{self}: {error}") from error
        if self.kind == "events":
            return data
        return Frames(data.view(np.uint8) if data.dtype.kind == "b" else data)

    def usable(
        self, index: Integer[np.ndarray, " frames"] | slice | None = None
    ) -> Frames | EventRows:
        """What `host` gives, without what is in the pixels that `mask` leaves out."""
        counts = self.host(index)
        return counts if self.mask is None else masked(counts, self.mask)  # pyright: ignore

    def positions(self, index: Integer[np.ndarray, " frames"] | slice | None) -> Positions:
        """`index` as an array of flat positions."""
        if index is None or isinstance(index, slice):
            return np.arange(len(self))[index or slice(None)]
        wrong = (index < 0) | (index >= len(self))
        if wrong.any():
            raise InputError(
                f"{self}: there is no scan position {index[wrong][0]}; the scan of "
                f"{self.scan_shape[0]} × {self.scan_shape[1]} has 0 to {len(self) - 1}."
            )
        return index.astype(int)

    def blocks(self, size: int | None = None) -> Iterator[Positions]:
        """Every position once, in groups.

        With `size`, runs of the scan whose frames take about as many bytes. By default groups
        small enough to stay in a processor's cache; where frames are stored together, groups of
        whole pieces, so that none is read twice, which need not be runs.
        """
        frame = self.frame_bytes or math.prod(self.frame_shape) * self.dtype.itemsize
        tiles = self.together if size is None else 1
        if not isinstance(tiles, Tiles):
            tiles = Tiles(1, tiles or len(self), len(self))
        usual = TILES_BYTES if isinstance(self.together, Tiles) else BLOCK_BYTES
        yield from tiles.fitting(MOST_BYTES / frame).groups(len(self), (size or usual) / frame)

    def complain(self, what: str, positions: Positions) -> None:
        """Raise InputError: `what` is wrong in the frames at these positions, if there are any."""
        if len(positions):
            first = int(positions[0])
            row, column = divmod(first, self.scan_shape[1])
            raise InputError(
                f"{self}: {len(positions)} of {len(self)} frames {FAULTS[what]}, the first is "
                f"frame {first} (scan position {row}, {column}). {REMEDIES[what]}"
            )


FAULTS = {
    "not finite": "have pixels that are not a number or infinite",
    "negative": "have negative counts",
    "not whole": "have counts that are not whole numbers",
    "empty": "have no counts at all",
}
"""What may be wrong with a frame, in words."""
REMEDIES = {
    "not finite": "Replace them with counts, or leave these pixels out by cropping.",
    "negative": "Undo the subtraction of a background, or count the electrons.",
    "not whole": "Poisson statistics need electrons: divide by the counts that an electron makes "
    "(`preprocess.counts_per_electron`), or choose a `method.loss` of amplitudes.",
    "empty": "Frames were dropped, or the beam was off: leave these positions out; where the dose "
    "explains them, add `accept_implausible: true` to the experiment file.",
}
UNUSABLE = ("not finite", "negative")
# What only a damaged file claims to have.
MOST_PIXELS, MOST_FRAMES = 2**28, 2**36
# Of a block: of plain frames, of those that a library unpacks, for which it opens the file each
# time, and where one piece is as large.
BLOCK_BYTES, TILES_BYTES, MOST_BYTES = 2**22, 2**24, 2**25


PAIRS = "scan_step_A", "detector_pixel_mrad", "detector_pixel_inv_A", "center"
NUMBERS = (
    "rotation_deg",
    "energy_ev",
    "semiangle_mrad",
    "semiangle_pixels",
    "counts_per_electron",
    "defocus_A",
    "exposure_s",
)


def kept_facts(said: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in a mapping, as `Source` has them; what is none of them is left out."""
    facts: dict[str, Any] = {}
    for name in (*PAIRS, *NUMBERS, "transpose"):
        try:
            value = np.atleast_1d(np.asarray(said.get(name, "")))
        except ValueError:
            continue
        if value.dtype.kind not in "biuf" or not np.isfinite(value).all():
            continue
        if name in PAIRS and value.shape == (2,):
            facts[name] = (float(value[0]), float(value[1]))
        elif name not in PAIRS and value.shape == (1,):
            facts[name] = bool(value[0]) if name == "transpose" else float(value[0])
    return facts


def faults(frames: Shaped[np.ndarray, "frames ky kx"]) -> dict[str, Bool[np.ndarray, " frames"]]:
    """For each of `FAULTS`, which of these dense frames have it."""
    pixels = frames.reshape(len(frames), math.prod(frames.shape[1:]))
    none = np.zeros(len(frames), bool)
    found = dict.fromkeys(FAULTS, none) | {"empty": np.max(pixels != 0, axis=1) == 0}
    if frames.dtype.kind == "f":
        found["not finite"] = np.min(np.isfinite(pixels), axis=1) == 0
        found["not whole"] = (np.max(np.floor(pixels) != pixels, axis=1) > 0) & ~found["not finite"]
    if frames.dtype.kind in "fi":
        found["negative"] = np.min(pixels, axis=1) < 0
    return found


def _storable(frames: Shaped[np.ndarray, "frames ky kx"], source: object) -> np.ndarray:
    """Frames in a type that JAX keeps: the stored one, or its 32-bit sibling."""
    wanted = {"b": np.dtype(np.uint8), "f": np.dtype(np.float32)}.get(frames.dtype.kind)
    if wanted is None or frames.dtype == np.float64:
        wanted = np.dtype(jax.dtypes.canonicalize_dtype(frames.dtype))
    if wanted.kind in "iu" and frames.max(initial=0) > np.iinfo(wanted).max:
        raise InputError(
            f"{source}: a count of {frames.max()} does not fit into {wanted}; these are hardly "
            "electrons: check the dataset, or store them as floating-point numbers."
        )
    return frames.astype(wanted, copy=False)


def layout(
    name: str,
    shape: tuple[int, ...],
    scan_shape: tuple[int, int] | None,
    frame_shape: tuple[int, int] | None,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Scan and frame shape of a dense array of `shape`, agreed with what the user says.

    **Raises:** InputError unless there are four axes, or three and a scan shape, and all agree.
    """
    if len(shape) not in (3, 4):
        raise InputError(
            f"{name} has shape {shape}; frames need four axes (scan_y, scan_x, ky, kx), or three "
            "(frames, ky, kx) with a `scan_shape`."
        )
    frames, pixels = math.prod(shape[:-2]), (shape[-2], shape[-1])
    if scan_shape is None and len(shape) == 3:
        raise InputError(
            f"{name} is a stack of {frames} frames, shape {shape}; give its `scan_shape` (slow, "
            f"fast), whose product is {frames}."
        )
    scan = (shape[0], shape[1]) if scan_shape is None else (int(scan_shape[0]), int(scan_shape[1]))
    if math.prod(scan) != frames:
        raise InputError(
            f"{name} has {frames} frames (shape {shape}), but scan_shape={scan} asks for "
            f"{math.prod(scan)}; give one whose product is {frames}."
        )
    if frame_shape is not None and tuple(frame_shape) != pixels:
        raise InputError(
            f"{name} has frames of {pixels} pixels, but frame_shape={tuple(frame_shape)} was "
            "asked for; leave it out, or crop after reading."
        )
    if min(*scan, *pixels) < 1:
        raise InputError(f"{name} has shape {shape}: there is no frame in it.")
    if math.prod(pixels) > MOST_PIXELS or math.prod(scan) > MOST_FRAMES:
        raise InputError(
            f"{name} has {scan[0]} × {scan[1]} frames of {pixels[0]} × {pixels[1]} pixels, more "
            "than any detector gives; the sizes in the file are damaged: copy it again."
        )
    return scan, pixels


def numeric(name: str, dtype: np.dtype) -> np.dtype:
    """`dtype`, if it can hold counts.

    **Raises:** InputError for complex numbers, text and records.
    """
    if dtype.kind not in "buif":
        raise InputError(
            f"{name} holds {dtype}, which are not counts; integers or real numbers are needed."
        )
    return dtype


def runs(wanted: Positions, width: int | None = None) -> Iterator[tuple[int, int]]:
    """Where consecutive numbers begin and end in sorted ones, none beyond a multiple of `width`."""
    new = np.diff(wanted, prepend=-2) != 1
    if width is not None:
        new |= wanted % width == 0
    edges = np.append(np.flatnonzero(new), len(wanted)).tolist()
    yield from zip(edges[:-1], edges[1:], strict=True)


def gather(array: Any, positions: Positions) -> Shaped[np.ndarray, "frames ky kx"]:
    """Frames at flat `positions` of a 3D or 4D array on disk, reading nothing else.

    `array` is anything with `shape`, `dtype` and slices: a memory map or an HDF5 dataset, whose
    `read_direct` spares a copy.
    """
    wanted, back = np.unique(positions, return_inverse=True)
    width = array.shape[1] if array.ndim == 4 else array.shape[0]
    shape = (len(wanted), *array.shape[-2:])
    frames = np.empty(shape, np.dtype(array.dtype).newbyteorder("="))
    for start, stop in runs(wanted, width):
        row, column = divmod(int(wanted[start]), width)
        run = slice(column, column + int(stop - start))
        place = (row, run) if array.ndim == 4 else run
        if hasattr(array, "read_direct"):
            array.read_direct(frames, place, slice(start, stop))
        else:
            frames[start:stop] = array[place]
    return frames if np.array_equal(back, np.arange(len(back))) else frames[back]
