"""Whatever LiberTEM reads (blo, tvips, seq, mrc, frms6, ...), where its extra is installed.

LiberTEM (MIT licence) is imported when a file is opened: by `read(path, format="libertem")`, or
when no format of our own recognises the file. It describes the shapes, and says nothing of units.
"""

import importlib
import importlib.util
import math
import pathlib
from typing import Any

import numpy as np

from ..counts import InputError
from .damage import raised_in
from .source import layout, Load, numeric, Positions, Source


LIBRARY = "libertem"


def installed() -> bool:
    """Whether the extra is there."""
    return importlib.util.find_spec(LIBRARY) is not None


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    filetype: str = "auto",
) -> Source:
    """Describe a file in LiberTEM's words; `filetype` is the name of one of its formats.

    **Raises:** InputError if LiberTEM is not installed, cannot read the file, or finds no frames.
    """
    if not installed():
        raise InputError(
            f"{path}: to read it through LiberTEM, install it: pip install 'smpr3d_jax[libertem]'."
        )
    more = {} if dataset is None else {"ds_path": dataset}
    try:
        context = importlib.import_module("libertem.api").Context.make_with("inline")
        data = context.load(filetype, path=str(path), **more)
        nav, sig, dtype = tuple(data.shape.nav), tuple(data.shape.sig), np.dtype(data.dtype)
    except Exception as error:
        _complain(path, error)
        raise
    label = f"{path}: LiberTEM's data set"
    dtype = numeric(label, dtype)
    scan, frame = layout(label, (*nav, *sig), scan_shape, frame_shape)
    load = _loader(path, context, data, nav)
    return Source(path, LIBRARY, dataset or "", scan, frame, dtype, "dense", load)


def _complain(path: pathlib.Path, error: Exception) -> None:
    """Raise InputError if LiberTEM is at fault, or the file that it read."""
    if raised_in(LIBRARY, error):
        raise InputError(
            f"{path}: LiberTEM cannot read it ({error}); name the format with `filetype`."
        ) from error


def _loader(path: pathlib.Path, context: Any, data: Any, nav: tuple[int, ...]) -> Load:
    """How to load frames: LiberTEM picks those of a region, in the order of the scan."""
    pick = importlib.import_module("libertem.udf.raw").PickUDF

    def load(positions: Positions):
        wanted, back = np.unique(positions, return_inverse=True)
        region = np.zeros(math.prod(nav), bool)
        region[wanted] = True
        try:
            picked = context.run_udf(dataset=data, udf=pick(), roi=region.reshape(nav))
        except Exception as error:
            _complain(path, error)
            raise
        frames = np.asarray(picked["intensity"].data).reshape(len(wanted), *data.shape.sig)
        return frames[back]

    return load
