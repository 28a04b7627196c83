"""Reconstructions of other packages, read into our conventions and written back.

`read` knows a file by its content: py4DSTEM's saved classes, phaser's states, PtyRAD's models.
`Exchange` says exactly what the numbers mean; `patterns` computes what they predict.
"""

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from ..counts import InputError
from . import (
    phaser as phaser,
    phaser_plan as phaser_plan,
    ptyrad as ptyrad,
    ptyrad_params as ptyrad_params,
    py4dstem as py4dstem,
)
from .aberrations import (
    from_phaser as from_phaser,
    from_ptyrad as from_ptyrad,
    from_py4dstem as from_py4dstem,
    to_phaser as to_phaser,
    to_ptyrad as to_ptyrad,
    to_py4dstem as to_py4dstem,
)
from .forward import patterns as patterns
from .recipe import load, Recipe as Recipe
from .record import Exchange as Exchange


class Format(NamedTuple):
    """How to tell a format by its content, read it, and write it."""

    recognises: Callable[[pathlib.Path], bool]
    read: Callable[[pathlib.Path], Exchange]
    write: Callable[[pathlib.Path, Exchange], None]


FORMATS = {
    "phaser": Format(phaser.recognises, phaser.read, phaser.write),
    "ptyrad": Format(ptyrad.recognises, ptyrad.read, ptyrad.write),
    "py4dstem": Format(py4dstem.recognises, py4dstem.read, py4dstem.write),
}


def read(path: str | os.PathLike, format: str | None = None) -> Exchange:
    """The reconstruction in a file of another package; `format` is one of `FORMATS` (None: look).

    **Raises:** InputError, with the file's name and the key in it, if it cannot be used.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist, or is no file.")
    if format is None:
        known = [name for name, one in FORMATS.items() if one.recognises(path)]
        if not known:
            raise InputError(f"{path}: is no reconstruction that is known of {[*FORMATS]}.")
        format = known[0]
    try:
        return _format(path, format).read(path)
    except InputError as error:
        named = str(path) in str(error)
        raise error if named else InputError(f"{path}: {error}") from error


def write(path: str | os.PathLike, exchange: Exchange, format: str) -> None:
    """Write a reconstruction so that another package reads it; `format` is one of `FORMATS`.

    **Raises:** InputError for what the format has no place for.
    """
    path = pathlib.Path(path)
    _format(path, format).write(path, exchange)


RECIPES = {"ptyrad": ptyrad_params, "phaser": phaser_plan}


def read_recipe(path: str | os.PathLike) -> Recipe:
    """What a parameter file of PtyRAD or a plan of phaser says, in the keys of our experiment file.

    **Raises:** InputError, with the file's name and the key in it, if it cannot be used.
    """
    path = pathlib.Path(path)
    tree = load(path)
    for one in RECIPES.values():
        if one.recognises(tree):
            try:
                return one.read(path, tree)
            except InputError as error:
                named = str(path) in str(error)
                raise error if named else InputError(f"{path}: {error}") from error
    raise InputError(
        f"{path}: has the keys {', '.join(map(str, tree))}; PtyRAD's parameters have "
        "`init_params`, and phaser's plans `raw_data`."
    )


def _format(path: pathlib.Path, name: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"{path}: there is no format {name!r}; known are {[*FORMATS]}.")
    return FORMATS[name]
