"""The store: what is loaded equals what was saved, and a file is complete or not there."""

import json
import math

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.report import store


def same(a, b) -> bool:
    """Equal trees: arrays by dtype, shape and value; facts by type and value."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return type(a) is type(b) and a == b


TREES = {
    "arrays": {
        "waves": np.arange(6).reshape(2, 3).astype(np.complex64) * (1 + 2j),
        "counts": np.arange(4, dtype=np.uint8),
        "mask": np.array([[True, False]]),
        "names": np.array(["Å", "rad"]),
        "scalar": np.array(3.0),
        "empty": np.zeros((0, 3), np.float32),
    },
    "facts": {
        "none": None,
        "yes": True,
        "count": 3,
        "huge": 10**30,
        "size": 0.25,
        "complex": 1 - 2j,
        "text": "80 kV, Å\n<b>",
        "blank": "",
        "tricky": "json:not json",
        "nul": "a\0b",
        "odd bytes": "\udcff",
    },
    "lists": {
        "numbers": [1, 2, 3],
        "table": [[0.5, 1.5], [2.5, 3.5]],
        "mixed": [1, 2.5, "three", None, True],
        "scans": [{"file": "scan_0.h5", "defocus": -150.0}, {"file": "scan_1.h5"}],
        "nothing": [],
        "long": [float(i) for i in range(20000)],
    },
    "nested": {"a": {"b": {"c": np.eye(2, 3), "unit": "Å"}, "empty": {}}, "title": "tubes"},
}


@pytest.mark.parametrize("name", TREES)
def test_load_returns_what_was_saved(tmp_path, name):
    store.save(tmp_path / "a.h5", TREES[name])
    assert same(store.load(tmp_path / "a.h5"), TREES[name])


def test_jax_arrays_numpy_scalars_and_tuples_become_plain(tmp_path):
    tree = {"x": jnp.ones((2, 3), jnp.float32), "n": np.int32(4), "origin_A": (np.float64(-1), 2.0)}
    store.save(tmp_path / "a.h5", tree)
    expected = {"x": np.ones((2, 3), np.float32), "n": 4, "origin_A": [-1.0, 2.0]}
    assert same(store.load(tmp_path / "a.h5"), expected)


def test_another_program_finds_native_types(tmp_path):
    store.save(tmp_path / "a.h5", {"s": {"wave": np.ones(2, np.complex64), "origin_A": (1.0, 2.0)}})
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.asarray(file["s/wave"]).dtype == np.complex64
        np.testing.assert_array_equal(file["s"].attrs["origin_A"], [1.0, 2.0])


def test_attributes_are_placed_and_read_back(tmp_path):
    facts = {"pixel_size_A": 0.4, "origin_A": [-1.0, -2.0], "units": "rad"}
    store.save(tmp_path / "a.h5", {"s": {"phase": np.ones(3)}}, {"s/phase": facts, "/": {"v": 1}})
    assert store.attributes(tmp_path / "a.h5", "s/phase") == facts
    assert store.attributes(tmp_path / "a.h5") == {"v": 1}
    with pytest.raises(ValueError, match="'s/face'"):
        store.save(tmp_path / "b.h5", {"s": {"phase": np.ones(3)}}, {"s/face": facts})


def test_a_part_is_loaded_by_its_key(tmp_path):
    store.save(tmp_path / "a.h5", {"s": {"phase": np.arange(3), "unit": "rad"}, "n": 2})
    np.testing.assert_array_equal(store.load(tmp_path / "a.h5", "s/phase"), np.arange(3))
    assert store.load(tmp_path / "a.h5", "/s/unit") == "rad"
    assert store.load(tmp_path / "a.h5", "n") == 2


def test_errors_of_reading_name_file_and_remedy(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(FileNotFoundError, match=r"a\.h5"):
        store.load(path)
    store.save(path, {"sections": {"phase": np.zeros(50000)}})
    with pytest.raises(ValueError, match="Did you mean 'sections/phase'"):
        store.load(path, "sections/phases")
    with pytest.raises(ValueError, match=r"has no 'probe'. It has \['sections'\]"):
        store.load(path, "probe")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"a\.h5 is not a complete HDF5 file"):
        store.load(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="not a complete HDF5 file"):
        store.attributes(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": object()}}, "/a/b.*object"),
        ({"a/b": 1}, "without '/'"),
        ({"": 1}, "non-empty"),
        ({3: 1}, "string"),
        ({"a": np.array([{}], object)}, "/a: an array of object"),
        ({"a": [1j, "x"]}, "complex"),
        ({"a": [np.ones(2), print]}, r"/a\[1\]"),
    ],
)
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, tree, message):
    path = tmp_path / "a.h5"
    store.save(path, {"n": 1})
    with pytest.raises(ValueError, match=message):
        store.save(path, {"big": np.ones(100000)} | tree)
    assert store.load(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_replacing_removes_its_file_on_interruption(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), store.replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_follows_links_and_refuses_folders(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    store.write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == [1]
    with pytest.raises(ValueError, match="it is a folder"):
        store.write_json(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        store.write_json(tmp_path / "no" / "a.json", {})


def test_json_is_valid_and_what_is_not_finite_is_null(tmp_path):
    facts = {
        "r_factor": np.float32(0.25),
        "loss_history": np.array([1.0, np.nan, np.inf]),
        "where": tmp_path,
        "unit": "Å",
        "nested": {1: (math.inf, jnp.asarray(2))},
    }
    store.write_json(tmp_path / "m.json", facts)
    text = (tmp_path / "m.json").read_text(encoding="utf-8")
    expected = {
        "r_factor": 0.25,
        "loss_history": [1.0, None, None],
        "where": str(tmp_path),
        "unit": "Å",
        "nested": {"1": [None, 2]},
    }
    assert json.loads(text) == expected
    with pytest.raises(ValueError, match="complex"):
        store.write_json(tmp_path / "m.json", {"a": 1j})
    with pytest.raises(ValueError, match="value/f: .*function"):
        store.write_json(tmp_path / "m.json", {"f": lambda: 0})
    assert (tmp_path / "m.json").read_text(encoding="utf-8") == text
