"""From files to counts: one file a format, chosen by looking inside the data.

`read(path)` describes a scan without reading its frames; `register` adds a format.
"""

import dataclasses
import inspect
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..counts import InputError
from ..dataset import Dataset
from . import (
    arrays,
    dectris,
    dm4,
    emd,
    emd_legacy,
    empad,
    hyperspy,
    libertem,
    matlab,
    mib,
    nexus,
    raw_csr,
    rosettasciio,
    stempy,
    zarr,
)
from .emd import write_emd as write_emd
from .masks import common_mask as common_mask, read_mask as read_mask, with_mask as with_mask
from .raw_csr import write_raw_csr as write_raw_csr
from .series import load_series as load_series
from .source import MOST_BYTES, Source as Source, Tiles as Tiles
from .stempy import write_stempy as write_stempy
from .steps import (
    descanned as descanned,
    in_electrons as in_electrons,
    through_window as through_window,
    without_bad_pixels as without_bad_pixels,
)
from .survey import (
    check_counts as check_counts,
    check_series as check_series,
    describe as describe,
    Survey as Survey,
    survey as survey,
)


class Format(NamedTuple):
    """How to tell a format by the content, and how to open it; `folder` is None for either."""

    recognises: Callable[[pathlib.Path], bool]
    open: Callable[..., Source]
    folder: bool | None = False


# In the order of asking: the one that takes any array comes last.
_FORMATS: dict[str, Format] = {
    "emd": Format(emd.recognises, emd.open_source),
    "emd_legacy": Format(emd_legacy.recognises, emd_legacy.open_source),
    "stempy": Format(stempy.recognises, stempy.open_source),
    "raw_csr": Format(raw_csr.recognises, raw_csr.open_source),
    "dm": Format(dm4.recognises, dm4.open_source),
    "mib": Format(mib.recognises, mib.open_source),
    "empad": Format(empad.recognises, empad.open_source),
    "dectris": Format(dectris.recognises, dectris.open_source),
    "hyperspy": Format(hyperspy.recognises, hyperspy.open_source, folder=None),
    "matlab": Format(matlab.recognises, matlab.open_source),
    "nexus": Format(nexus.recognises, nexus.open_source),
    "zarr": Format(zarr.recognises, zarr.open_source, folder=None),
    "arrays": Format(arrays.recognises, arrays.open_source),
}
EXTRAS = {"libertem": libertem, "rosettasciio": rosettasciio}
"""Libraries that read more formats, if they are installed."""


def register(
    name: str,
    recognises: Callable[[pathlib.Path], bool],
    open: Callable[..., Source],
    folder: bool | None = False,
) -> None:
    """Add a format, asked before all others, or replace the one of this name.

    `recognises(path)` looks inside the file; `open(path, **hints)` returns a `Source` whose `load`
    takes flat scan positions and gives numpy frames or `EventRows`. `folder`: the format
    keeps its data in a folder, as zarr does; None: in a file or a folder.
    """
    others = {key: value for key, value in _FORMATS.items() if key != name}
    _FORMATS.clear()
    _FORMATS.update({name: Format(recognises, open, folder), **others})


def read(path: str | os.PathLike, **hints: Any) -> Source:
    """Describe the scan in a file, reading none of its frames; `Source.read` gives the counts.

    Hints say what the file does not: `dataset` (name inside the file), `scan_shape` (slow, fast),
    `frame_shape` (ky, kx), and `format` to skip the recognition.

    **Raises:** InputError, with the file's name and a remedy, if there is no such file, no format
    recognises it, or it holds no frames.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(
            f"{path} does not exist; check the path, relative to {pathlib.Path.cwd()}."
        )
    if "format" in hints:
        name = hints.pop("format")
        known = {key: reader.open for key, reader in _FORMATS.items()}
        known |= {key: extra.open_source for key, extra in EXTRAS.items()}
        if name not in known:
            raise InputError(f"{path}: there is no format {name!r}; known are {[*known]}.")
        return _open(known[name], path, hints)
    folder = path.is_dir()
    for reader in _FORMATS.values():
        if reader.folder in (folder, None) and reader.recognises(path):
            return _open(reader.open, path, hints)
    if folder:
        raise InputError(
            f"{path} is a folder, and none that a format keeps its data in; name a file in it."
        )
    return _through_extras(path, hints)


def _open(open: Callable[..., Source], path: pathlib.Path, hints: dict[str, Any]) -> Source:
    """What a reader says of a file, if it knows all hints."""
    known = inspect.signature(open).parameters
    unknown = [name for name in hints if name not in known]
    if unknown and all(known[name].kind != inspect.Parameter.VAR_KEYWORD for name in known):
        raise InputError(
            f"{path}: its format takes no hint {unknown[0]!r}; it takes "
            f"{', '.join([*known][1:])}. Leave it out."
        )
    return _noted(open(path, **hints))


def _noted(source: Source) -> Source:
    """With a note where frames share too much with others to be read in one pass."""
    stored, frame = source.together, math.prod(source.frame_shape) * source.dtype.itemsize
    if not isinstance(stored, Tiles) or stored.rows * stored.columns * frame <= MOST_BYTES:
        return source
    frames = stored.rows * stored.columns
    times = -(-frames * frame // MOST_BYTES)
    note = (
        f"{frames} frames ({frames * frame / 2**20:.0f} MiB) share their chunks, which a pass over "
        f"the file unpacks {times} times, one as a whole at a time; write it with smaller chunks "
        "before long work"
    )
    return dataclasses.replace(source, notes=(*source.notes, note))


def _through_extras(path: pathlib.Path, hints: dict[str, Any]) -> Source:
    """What a library that was installed for it reads of a file in no format of our own."""
    with open(path, "rb") as file:
        start = file.read(8)
    said = ""
    for extra in EXTRAS.values():
        if extra.installed():
            try:
                return _open(extra.open_source, path, hints)
            except InputError as error:
                said += f" {error}"
    raise InputError(
        f"{path}: is in none of the known formats {[*_FORMATS]}; it is not HDF5 and not a numpy "
        f"file, but begins with {start!r}.{said} Convert it, add a reader with `register`, or "
        "install the extra 'libertem' or 'rosettasciio', which read more formats."
    )


def read_series(
    paths: Sequence[str | os.PathLike],
    scan_step: float | tuple[float, float],
    rotation: float = 0.0,
    transpose: bool = False,
    center: tuple[float, float] | None = None,
    **hints: Any,
) -> Dataset:
    """The dataset of a series from its files; arguments as for `load_series` and `read`.

    **Raises:** InputError for files that cannot be read or do not belong together.
    """
    sources = [read(path, **hints) for path in paths]
    check_series(sources)
    return load_series(sources, scan_step, rotation, transpose, center)
