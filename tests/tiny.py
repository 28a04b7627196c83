"""A job so small that a test can afford all of it: a specimen, its series, the command line."""

import pathlib
from typing import Any

import ase
import numpy as np
from ruamel.yaml import YAML
from typer.testing import CliRunner

import smpr3d_jax as sj
from smpr3d_jax.app import cli


FEW = ("--iterations", "3")
SCAN = (3, 6)
ACQUISITION = sj.Acquisition(
    semiangle=30.0, defocus=(-80.0, 20.0, 120.0), scan_shape=SCAN, scan_step=0.5, dose=1e5,
    detector_angle=50.0, sampling=0.3, slice_thickness=5.0, seed=3,
)  # fmt: skip


def specimen() -> ase.Atoms:
    """Eight silicon atoms on two planes, at 5 and at 35 Å."""
    upper = [(7.0, 8.0), (9.0, 11.5), (11.0, 8.5), (13.0, 12.0)]
    lower = [(7.5, 12.5), (9.5, 9.0), (11.5, 10.5), (13.5, 8.5)]
    places = [(x, y, z) for z, layer in ((5.0, upper), (35.0, lower)) for x, y in layer]
    return ase.Atoms("Si8", places, cell=[20.0, 20.0, 40.0], tags=[0] * 4 + [1] * 4)


def simulated(**changes: Any):
    """The series, or one recorded otherwise."""
    how = {f: getattr(ACQUISITION, f) for f in ACQUISITION.__dataclass_fields__} | changes
    return sj.simulate(specimen(), sj.Acquisition(**how))


def smpr3d(*words: Any):
    """What the command answers: `exit_code`, `stdout`, `stderr`."""
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def content(file: pathlib.Path) -> dict[str, Any]:
    """The experiment file as nested dictionaries, the data files by their full names."""
    tree = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    for scan in tree["scans"]:
        scan["file"] = str(file.parent / scan["file"])
    return tree


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with other values, by key: {"scans.0.defocus": 5}; None takes the key away."""
    for key, value in changes.items():
        *path, last = (int(word) if word.isdigit() else word for word in key.split("."))
        node: Any = tree
        for word in path:
            node = node[word]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return tree


def write(folder: pathlib.Path, tree: dict[str, Any]) -> pathlib.Path:
    """An experiment file of such a tree."""
    path = folder / "experiment.yaml"
    with open(path, "w", encoding="utf-8") as file:
        YAML(typ="safe").dump(tree, file)
    return path


def correlation(a, b) -> float:
    """Pearson's, of two arrays of one shape."""
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])
