"""A volume of depth sections written plane after plane, so that it never has to fit into memory.

One HDF5 file holds `/sections/phase` (z, y, x) float32 rad, a plane a chunk, with the attributes
`pixel_size_A` (one number, or (y, x) where they differ) and `origin_A` ((y, x) of pixel (0, 0)
relative to the first scan position), and `/sections/z`, the depths in Å. One TIFF holds the same
planes for ImageJ and Fiji, calibrated in Å along all three axes, each plane labelled with its
depth. Both appear under their names only when the last plane has been written.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import h5py
import numpy as np
import tifffile
from jaxtyping import Float, Real

from . import store


Pair = float | int | Sequence[float | int] | Real[Any, ""] | Real[Any, "2"]
"""One number for both axes, or (y, x)."""
Depths = Sequence[float | int] | Real[Any, " depths"]
"""The depth of every plane, Å."""

# beyond this the directory of a TIFF, 32 bits wide, cannot point at the last planes; ImageJ then
# finds them from the first, as it does for its own large stacks
_TIFF_LIMIT = 2**32 - 2**25


class SectionWriter:
    """Receives the planes of a volume from the first depth to the last."""

    def __init__(self, phase: h5py.Dataset, tiff: BinaryIO | None):
        self._phase, self._tiff = phase, tiff
        self.written = 0

    def write(self, block: Float[Any, "planes y x"]) -> None:
        """Append one or several planes (rad).

        **Raises:** ValueError where the planes are of another size or more than there are depths.
        """
        planes = np.asarray(block)
        end, (total, *shape) = self.written + len(planes), self._phase.shape
        if list(planes.shape[1:]) != shape or end > total:
            raise ValueError(
                f"A block of shape {planes.shape} after {self.written} planes does not fit into a "
                f"volume of {total} depths and planes of {tuple(shape)} pixels (y, x)."
            )
        planes = np.ascontiguousarray(planes, np.float32)
        self._phase[self.written : end] = planes
        if self._tiff is not None:
            self._tiff.write(planes.data)
        self.written = end

    def attach(
        self,
        tree: Mapping[str, Any],
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Keep a nested dict of arrays and facts (as `store.save` takes) in the same HDF5 file."""
        store.write(self._phase.file, tree, attributes)


@contextlib.contextmanager
def section_writer(
    path: store.Path,
    tiff: store.Path | None = None,
    *,
    depths: Depths,
    shape: tuple[int, int],
    pixel_size: Pair,
    origin: Pair = 0.0,
) -> Iterator[SectionWriter]:
    """Open a volume for writing: HDF5 at `path` and, if named, an ImageJ TIFF at `tiff`.

    **Arguments:** `depths` Å, one a plane; `shape` (y, x) of a plane; `pixel_size` Å; `origin` Å,
    of pixel (0, 0) relative to the first scan position.

    **Raises:** ValueError for an impossible geometry, and at the end if planes are missing. After
    any error the files that stood at `path` and `tiff` stand there still.
    """
    z, pixel, corner = _checked(depths, shape, pixel_size, origin)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(store.replacing(path))
        planes = None
        if tiff is not None:
            images = stack.enter_context(store.replacing(tiff))
            offset = _allocate_tiff(images, z, shape, pixel, corner)
            planes = stack.enter_context(images.open("r+b"))
            planes.seek(offset)
        file = stack.enter_context(store.created(temporary))
        writer = SectionWriter(_create_phase(file, z, shape, pixel, corner), planes)
        yield writer
        if writer.written < len(z):
            raise ValueError(
                f"{path}: only {writer.written} of {len(z)} planes were written; nothing is kept."
            )


def _checked(depths: Depths, shape: tuple[int, int], pixel_size: Pair, origin: Pair):
    """Depths as an array, pixel size and origin as pairs."""
    z = np.asarray(depths, float)
    pixel, corner = pair(pixel_size), pair(origin)
    if z.ndim != 1 or len(z) == 0 or not np.all(np.isfinite(z)):
        raise ValueError(f"`depths` must be a list of one or more numbers (Å), got {depths!r}.")
    if len(shape) != 2 or min(shape) < 1 or not min(pixel) > 0:
        raise ValueError(
            f"A plane needs pixels and a positive pixel size, got {shape=}, {pixel_size=} Å."
        )
    return z, pixel, corner


def pair(value: Pair) -> tuple[float, float]:
    """(y, x) from one number or two."""
    y, x = np.broadcast_to(np.asarray(value, float), 2)
    return float(y), float(x)


def _create_phase(
    file: h5py.File,
    depths: np.ndarray,
    shape: tuple[int, int],
    pixel: tuple[float, float],
    origin: tuple[float, float],
) -> h5py.Dataset:
    group = file.create_group("sections")
    group["z"] = depths
    group["z"].attrs["units"] = "angstrom"
    size = (len(depths), *shape)
    phase = group.create_dataset("phase", size, np.float32, chunks=(1, *shape))
    phase.attrs["units"] = "rad"
    for node in (group, phase):
        node.attrs["pixel_size_A"] = pixel[0] if pixel[0] == pixel[1] else pixel
        node.attrs["origin_A"] = origin
    return phase


def _allocate_tiff(
    path: store.Path,
    depths: np.ndarray,
    shape: tuple[int, int],
    pixel: tuple[float, float],
    origin: tuple[float, float],
) -> int:
    """Write the header of an ImageJ stack; return where in the file its planes go, one by one."""
    spacing = float(np.mean(np.diff(depths))) if len(depths) > 1 else 1.0
    calibration = {
        "axes": "ZYX",
        "unit": "angstrom",
        "spacing": abs(spacing) or 1.0,
        # ImageJ's coordinate of pixel i is (i - origin) * size
        "xorigin": -origin[1] / pixel[1],
        "yorigin": -origin[0] / pixel[0],
        "zorigin": -depths[0] / (spacing or 1.0),
        "Labels": [f"z = {z:g} Å" for z in depths],
    }
    with tifffile.TiffWriter(path, imagej=True) as file:
        place = file.write(
            shape=(len(depths), *shape),
            dtype=np.float32,
            photometric="minisblack",
            resolution=(1 / pixel[1], 1 / pixel[0]),
            resolutionunit="NONE",
            metadata=calibration,
            contiguous=True,
            truncate=4 * len(depths) * shape[0] * shape[1] > _TIFF_LIMIT,
            returnoffset=True,
        )
    if place is None:
        raise ValueError(f"{path}: an ImageJ stack of {len(depths)} planes of {shape} is refused.")
    return place[0]
