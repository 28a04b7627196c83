"""Damaged files of every format are refused, or read as what they claim to be."""

import numpy as np
import pytest

from smpr3d_jax.data import readers

from . import fuzzing
from .examples import EXAMPLES


FEW, MANY = 60, 2000


def complaints(results: list[str]) -> list[str]:
    """What became of mutants that should not."""
    return [said for said in results if said not in ("refused", "read", "too large to read")]


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


def test_what_counts_as_a_failure(tmp_path, monkeypatch):
    """A reader that trusts a file is found out in every way there is."""
    (tmp_path / "a").write_bytes(b"scan")
    source = readers.Source(
        tmp_path / "a", "mine", "", (2, 3), (4, 5), np.dtype("u1"), "dense",
        lambda index: np.zeros((len(index), 5, 4), "u1"),
    )  # fmt: skip
    monkeypatch.setattr(fuzzing, "read", lambda path: source)
    with pytest.raises(AssertionError):
        fuzzing.outcome(tmp_path / "a", {})


@pytest.fixture(scope="module")
def few():
    return fuzzing.run([*EXAMPLES], FEW)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_few_damaged_files(few, name):
    assert len(few[name]) == FEW
    assert not complaints(few[name]), "\n".join(complaints(few[name])[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_many_damaged_files(name):
    results = fuzzing.run([name], MANY, seed=1)[name]
    assert len(results) == MANY
    assert not complaints(results), "\n".join(complaints(results)[:3])
    assert "refused" in results and "read" in results
