"""Whatever RosettaSciIO reads, where its extra is installed.

RosettaSciIO (GPL licence) is imported when a file is opened: by `read(path,
format="rosettasciio")`, or when no format of our own recognises the file. Its data are lazy dask
arrays, its axes and metadata those of HyperSpy.
"""

import importlib
import importlib.util
import pathlib
from typing import Any

import numpy as np

from ..counts import InputError
from .chunked import gather_chunked
from .damage import raised_in
from .hyperspy import MICROSCOPES, signal_facts
from .source import layout, Load, numeric, Positions, Source


LIBRARY = "rsciio"


def installed() -> bool:
    """Whether the extra is there."""
    return importlib.util.find_spec(LIBRARY) is not None


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    filetype: str | None = None,
) -> Source:
    """Describe a file as RosettaSciIO does; `filetype` is the name of one of its formats.

    **Raises:** InputError if RosettaSciIO is not installed, cannot read the file, or finds no
    frames in it.
    """
    if not installed():
        raise InputError(
            f"{path}: to read it through RosettaSciIO, install it (GPL licence): "
            "pip install 'smpr3d_jax[rosettasciio]'."
        )
    reader = _reader(path, filetype)
    try:
        signals = reader.file_reader(str(path), lazy=True)
    except Exception as error:
        _complain(path, error)
        raise
    title, signal = _chosen(path, signals, dataset, 3 if scan_shape is not None else 4)
    data = signal["data"]
    label = f"{path}: signal {title!r}"
    dtype = numeric(label, np.dtype(data.dtype))
    scan, frame = layout(label, tuple(data.shape), scan_shape, frame_shape)
    settings = signal.get("metadata", {}).get("Acquisition_instrument", {})
    microscopes = [settings.get(name, {}) for name in MICROSCOPES]
    facts = signal_facts(label, list(signal["axes"]), microscopes, frame)
    load = _loader(path, data)
    return Source(path, "rosettasciio", title, scan, frame, dtype, "dense", load, facts)


def _complain(path: pathlib.Path, error: Exception) -> None:
    """Raise InputError if RosettaSciIO is at fault, or the file that it read."""
    if any(raised_in(library, error) for library in (LIBRARY, "dask")):
        raise InputError(
            f"{path}: RosettaSciIO cannot read it ({type(error).__name__}: {error}); name the "
            "format with `filetype`."
        ) from error


def _reader(path: pathlib.Path, filetype: str | None) -> Any:
    """The module for a format, by its name or by the end of the file's name."""
    known = importlib.import_module(LIBRARY).IO_PLUGINS
    suffix = path.suffix.lower().lstrip(".")
    if filetype is not None:
        found = [plugin for plugin in known if plugin["name"].lower() == filetype.lower()]
    else:
        found = [plugin for plugin in known if suffix in map(str.lower, plugin["file_extensions"])]
    if len(found) != 1:
        names = sorted(plugin["name"] for plugin in (found or known))
        raise InputError(
            f"{path}: RosettaSciIO has {len(found)} formats for "
            f"{filetype or f'names that end in {path.suffix!r}'}; name one with `filetype`: "
            f"{', '.join(names)}."
        )
    return importlib.import_module(found[0]["api"])


def _chosen(
    path: pathlib.Path, signals: list[dict[str, Any]], dataset: str | None, axes: int
) -> tuple[str, dict[str, Any]]:
    """Title and description of the signal that was asked for, or of the only one of frames."""
    titled = [(str(_title(signal) or i), signal) for i, signal in enumerate(signals)]
    have = ", ".join(f"{title!r} {signal['data'].shape}" for title, signal in titled) or "none"
    if dataset is not None:
        found = [item for item in titled if item[0] == dataset]
    else:
        found = [item for item in titled if axes <= item[1]["data"].ndim <= 4]
    if len(found) != 1:
        raise InputError(
            f"{path}: RosettaSciIO finds the signals {have}; name one with `dataset`. Frames have "
            "four axes, or three with a `scan_shape`."
        )
    return found[0]


def _title(signal: dict[str, Any]) -> str:
    return signal.get("metadata", {}).get("General", {}).get("title", "")


class Computed:
    """A lazy dask array, computed when it is sliced."""

    def __init__(self, array: Any):
        self.array = array
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, np.dtype(array.dtype)

    def __getitem__(self, item: Any) -> np.ndarray:
        return np.asarray(self.array[item].compute())


def _loader(path: pathlib.Path, data: Any) -> Load:
    chunks = tuple(max(sizes) for sizes in data.chunks)

    def load(positions: Positions):
        try:
            return gather_chunked(Computed(data), positions, chunks)
        except Exception as error:
            _complain(path, error)
            raise

    return load
