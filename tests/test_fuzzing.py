"""Damaged files of every format are refused, or read as what they claim to be."""

import numpy as np
import pytest

from smpr3d_jax.data import readers
from smpr3d_jax.data.counts import InputError

from . import fuzzing
from .examples import EXAMPLES


FEW, MANY = 60, 2000
UNSAFE = {
    "dectris": ("bitshuffle (hdf5plugin 7)", "h5py/_hl/dataset.py"),
    "zspy": ("Blosc (numcodecs 0.16)", "zarr/core/array.py"),
}
"""Format -> what unpacks its chunks without a look at their ends, and where it is called."""


def complaints(results: list[str], name: str = "") -> list[str]:
    """What became of mutants that should not; one in 500 may crash what is known to be unsafe."""
    wrong = [said for said in results if said not in ("refused", "read", "too large to read")]
    if name not in UNSAFE or len(wrong) > max(1, len(results) // 500):
        return wrong
    known = "Segmentation fault", UNSAFE[name][1]
    return [said for said in wrong if not all(word in said for word in known)]


def test_mutants():
    data = bytes(range(256)) * 8 + b"sizes 128 x 256"
    made = list(fuzzing.mutants(data, 3, 200))
    assert made == list(fuzzing.mutants(data, 3, 200))
    assert sum(mutant != data for mutant in made) > 190
    assert len({len(mutant) for mutant in made}) > 50
    assert any(b"sizes" in mutant and b"128 x 256" not in mutant for mutant in made)
    assert len(list(fuzzing.mutants(b"", 0, 5))) == 5


def test_every_format_has_an_example(tmp_path):
    found = set()
    for i, make in enumerate(EXAMPLES.values()):
        (tmp_path / str(i)).mkdir()
        path, _ = make(tmp_path / str(i))
        fits = (
            name
            for name, known in readers._FORMATS.items()
            if known.folder in (path.is_dir(), None) and known.recognises(path)
        )
        found.add(next(fits))
    assert found == set(readers._FORMATS), "add the missing ones to tests/examples.py"


def claims(path, load):
    return readers.Source(path, "mine", "", (2, 3), (4, 5), np.dtype("u1"), "dense", load)


def nameless(index):
    raise InputError("nothing is right")


@pytest.mark.parametrize(
    "load, error",
    [
        (lambda index: np.zeros((len(index), 5, 4), "u1"), AssertionError),
        (lambda index: np.zeros((len(index), 4, 5), "u2"), AssertionError),
        (lambda index: {}[3], KeyError),
        (nameless, AssertionError),
    ],
)
def test_what_counts_as_a_failure(tmp_path, monkeypatch, load, error):
    monkeypatch.setattr(fuzzing, "read", lambda path: claims(path, load))
    with pytest.raises(error):
        fuzzing.outcome(tmp_path / "a", {})


def test_crashes_that_are_known():
    said = f"the process ended with -11: Segmentation fault ... {UNSAFE['zspy'][1]}"
    assert complaints(["read"] * 999 + [said], "zspy") == []
    assert complaints(["read"] * 999 + [said], "zarr") == [said]
    assert complaints(["read"] * 999 + [said] * 3, "zspy") == [said] * 3
    assert complaints(["read"] * 999 + ["KeyError"], "zspy") == ["KeyError"]


@pytest.fixture(scope="module")
def few():
    return fuzzing.run([*EXAMPLES], FEW)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_few_damaged_files(few, name):
    assert len(few[name]) == FEW
    wrong = complaints(few[name], name)
    assert not wrong, "\n".join(wrong[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_many_damaged_files(name):
    results = fuzzing.run([name], MANY, seed=1)[name]
    assert len(results) == MANY
    wrong = complaints(results, name)
    assert not wrong, "\n".join(wrong[:3])
    assert "refused" in results and "read" in results
