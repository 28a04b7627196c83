"""Formats that other libraries read for us: only where they are installed, and in our words."""

import os
import pathlib
import sys

import numpy as np
import pytest

from smpr3d_jax.data import readers
from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read
from smpr3d_jax.data.readers.source import Source

from .foreign import python_with, run
from .scan_files import flat, FRAME, SCAN
from .tree_files import counts


@pytest.fixture
def unknown(tmp_path):
    path = tmp_path / "scan.blo"
    path.write_bytes(b"no format of ours")
    return path


def answer(monkeypatch, name, error=None):
    """As if the extra `name` were installed, and read or refused the file."""

    def open_source(path, **hints):
        if error:
            raise InputError(error)
        cube = flat(counts())
        load = lambda positions: cube[positions]
        return Source(path, name, "", SCAN, FRAME, cube.dtype, "dense", load, hints)

    library = getattr(readers, name)
    monkeypatch.setattr(library, "installed", lambda: True)
    monkeypatch.setattr(library, "open_source", open_source)


@pytest.fixture(autouse=True)
def none_installed(monkeypatch):
    for library in (readers.libertem, readers.rosettasciio):
        monkeypatch.setattr(library, "installed", lambda: False)


@pytest.mark.parametrize("name", ["libertem", "rosettasciio"])
def test_an_extra_that_is_missing(unknown, name):
    with pytest.raises(InputError, match=rf"scan.blo: .*pip install 'smpr3d_jax\[{name}\]'"):
        read(unknown, format=name)


def test_an_unknown_format_names_the_extras(unknown):
    with pytest.raises(InputError, match="install the extra 'libertem' or 'rosettasciio'"):
        read(unknown)


def test_an_unknown_file_goes_to_what_is_installed(unknown, monkeypatch):
    answer(monkeypatch, "rosettasciio")
    source = read(unknown, scan_shape=SCAN)
    assert (source.format, source.facts) == ("rosettasciio", {"scan_shape": SCAN})
    answer(monkeypatch, "libertem")
    assert read(unknown).format == "libertem"
    answer(monkeypatch, "libertem", "LiberTEM cannot read it")
    assert read(unknown).format == "rosettasciio"
    answer(monkeypatch, "rosettasciio", "nor can the other")
    with pytest.raises(InputError, match="none of the known.*LiberTEM cannot.*nor can the other"):
        read(unknown)


def test_our_own_formats_come_first(tmp_path, monkeypatch):
    answer(monkeypatch, "libertem", "not asked")
    np.save(tmp_path / "a.npy", counts())
    assert read(tmp_path / "a.npy").format == "numpy"


WRITE = """
    import sys, numpy as np
    from rsciio import tvips

    cube = np.load(sys.argv[1])
    steps = [("y", 0.05, "nm"), ("x", 0.07, "nm"), ("ky", 0.2, "1/nm"), ("kx", 0.3, "1/nm")]
    axes = [
        dict(name=name, units=unit, navigate=i < 2, size=cube.shape[i], scale=step, offset=0.0,
             _type="UniformDataAxis", is_binned=False, index_in_array=i)
        for i, (name, step, unit) in enumerate(steps)
    ]
    metadata = dict(
        General=dict(title="scan", date="2020-01-01", time="00:00:00"),
        Signal=dict(signal_type=""),
        Acquisition_instrument=dict(TEM=dict(beam_energy=80.0)),
    )
    tvips.file_writer(sys.argv[2], dict(
        data=cube, axes=axes, original_metadata={}, metadata=metadata, attributes=dict(_lazy=False),
    ))
"""
READ = """
    import os, sys

    cube, path, paths = sys.argv[1:]
    # What the libraries need comes from their environment, what we need from ours.
    sys.path += paths.split(os.pathsep)

    import numpy as np
    from smpr3d_jax.data.counts import InputError
    from smpr3d_jax.data.readers import read

    flat = np.load(cube).reshape(15, 4, 6)
    for name in (None, "libertem", "rosettasciio"):
        hints = {} if name is None else {"format": name}
        try:
            read(path, **hints)
            raise SystemExit("a stack was read without its scan shape")
        except InputError as error:
            assert "scan_shape" in str(error), error
        source = read(path, scan_shape=(3, 5), **hints)
        assert source.format == (name or "libertem")
        assert (source.scan_shape, source.frame_shape) == ((3, 5), (4, 6))
        assert np.array_equal(source.read().dense(), flat)
        index = np.array([7, 14, 0, 7])
        assert np.array_equal(source.read(index).dense(), flat[index])
        print(source.facts)
    bad = path + "_bad.tvips"
    open(bad, "wb").write(open(path, "rb").read()[:700])
    for name in ("libertem", "rosettasciio"):
        try:
            read(bad, scan_shape=(3, 5), format=name).read()
            raise SystemExit("a file cut short was read")
        except InputError as error:
            print(error)
"""


@pytest.mark.slow
def test_files_read_through_the_libraries(tmp_path):
    python = python_with("libertem==0.16.0", "rosettasciio==0.15.0")
    np.save(tmp_path / "cube.npy", counts())
    path = tmp_path / "scan_000.tvips"
    run(python, WRITE, tmp_path / "cube.npy", path)
    paths = [str(pathlib.Path(__file__).parents[1]), *filter(None, sys.path)]
    said = run(python, READ, tmp_path / "cube.npy", path, os.pathsep.join(paths), timeout=900)
    facts = said.splitlines()[:3]
    assert facts == ["{}", "{}", "{'energy_ev': 80000.0}"]
