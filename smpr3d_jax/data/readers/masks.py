"""Which pixels of a camera may be used: read from a file, and told.

A mask is True (or 1) where a pixel is good. It lies as the frames in the files do. Cameras that
write which pixels are bad (NeXus' `pixel_mask`) say the opposite; their readers turn it.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Shaped

from ..counts import InputError
from .hdf5 import arrays as arrays_of, is_hdf5, listing, opened
from .source import Source


def read_mask(path: pathlib.Path, shape: tuple[int, int]) -> Bool[np.ndarray, "ky kx"]:
    """The mask in a .npy file, or in an HDF5 file that holds no other array of two axes.

    **Raises:** InputError unless it is an array of `shape`, of True and False or 1 and 0.
    """
    values = _hdf5(path) if is_hdf5(path) else _npy(path)
    if values.shape != shape:
        raise InputError(
            f"{path}: the mask has shape {values.shape}, but frames have {shape} pixels (ky, kx); "
            "make it for whole frames, as they are in the data files."
        )
    if values.dtype.kind not in "buif" or not np.all((values == 0) | (values == 1)):
        raise InputError(
            f"{path}: a mask holds True (or 1) where a pixel may be used and False (or 0) "
            f"elsewhere; this one holds other {values.dtype}."
        )
    return values.astype(bool)


def with_mask(source: Source, mask: Bool[np.ndarray, "ky kx"]) -> Source:
    """The source that uses only what both its own mask and this one let pass."""
    return dataclasses.replace(source, mask=mask if source.mask is None else mask & source.mask)


def common_mask(sources: Sequence[Source]) -> Bool[np.ndarray, "ky kx"] | None:
    """True where all scans have a pixel to use; None if that is everywhere.

    **Raises:** InputError if it is nowhere.
    """
    masks = [source.mask for source in sources if source.mask is not None]
    if not masks:
        return None
    mask = np.all(masks, axis=0)
    if not mask.any():
        raise InputError(
            f"{sources[0].path}: no pixel of the frames may be used, as the masks of "
            f"{len(masks)} scans say; 1 or True stands for good pixels."
        )
    return None if mask.all() else mask


def _npy(path: pathlib.Path) -> Shaped[np.ndarray, "*shape"]:
    try:
        return np.load(path)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path}: cannot be read as a mask ({error}); save an array of True and False with "
            "`numpy.save`, or one dataset of 1 and 0 in an HDF5 file."
        ) from error


def _hdf5(path: pathlib.Path) -> Shaped[np.ndarray, "*shape"]:
    with opened(path) as file:
        flat = [item for item in arrays_of(file).values() if item.ndim == 2]
        if len(flat) != 1:
            raise InputError(
                f"{path}: a mask is the only dataset of two axes in its file; this one has "
                f"{listing(file)}."
            )
        return np.asarray(flat[0])
