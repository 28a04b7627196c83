"""3D phase contrast from 4D-STEM: scattering-matrix phase retrieval and depth sectioning in JAX.

A model is any pytree that can be called with frame indices; a noise model is a function of one
pixel, `(intensity, count) -> float`; a loss is a function of model and batch; an optimiser is
optax's. Lengths in Å, energies in eV, angles in mrad; z = 0 is the plane on which a scan of defocus
0 is focused, positive along the beam.
"""

import ast
import importlib
import importlib.metadata
import pathlib
from typing import Any


__version__ = importlib.metadata.version("smpr3d_jax")


def _places() -> dict[str, str]:
    """For each public name the module that `__init__.pyi` has it from."""
    tree = ast.parse(pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f".{node.module}" for node in froms for alias in node.names}


_PLACES = _places()


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported now: to read a file should not cost all of them."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = importlib.import_module(_PLACES[name], __name__)
    if not hasattr(place, name):
        importlib.import_module(f"{_PLACES[name]}.{name}", __name__)
    globals()[name] = found = getattr(place, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
