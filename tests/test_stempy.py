"""Electron events of every version, as they are left on disk."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data import readers
from smpr3d_jax.data.counts import Events, events_from_frames, Frames, InputError
from smpr3d_jax.data.readers import (
    check_counts,
    describe,
    read,
    write_stempy,
)

from .scan_files import flat, FRAME, lists_of, opened, save_events, SCAN, some_cube, split_entries


@pytest.fixture
def v3(tmp_path):
    return save_events(tmp_path / "v3.h5", lists_of(some_cube()), np.arange(15), 3)


def test_version_1(tmp_path):
    """One entry a position, in the order of acquisition, its frames merged."""
    cube, order = some_cube(), np.random.default_rng(3).permutation(15)
    entries = [lists_of(cube)[i] for i in order]
    path = save_events(tmp_path / "v1.h5", entries, order.astype(np.int16), 1)
    source = read(path, frame_shape=FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    assert source.notes == ()


def test_version_2(tmp_path):
    """Several entries a position in any order, and a position without any."""
    entries, positions = split_entries(some_cube())
    kept = positions != 6
    entries = [e for e, k in zip(entries, kept, strict=True) if k]
    path = save_events(tmp_path / "v2.h5", entries, positions[kept], 2)
    source = read(path, frame_shape=FRAME)
    expected = flat(some_cube()).copy()
    expected[6] = 0
    np.testing.assert_array_equal(source.read().dense(), expected)
    index = np.array([14, 6, 2, 2])
    np.testing.assert_array_equal(source.read(index).dense(), expected[index])
    assert source.notes == (
        "1 scan positions have no entry",
        "up to 2 frames a position, which are summed",
    )


@pytest.mark.parametrize("per_position", [1, 2])
def test_version_3(tmp_path, per_position):
    entries = lists_of(some_cube())
    if per_position == 2:
        entries = [half for e in entries for half in (e[:4], e[4:])]
    path = save_events(tmp_path / "v3", entries, np.arange(15), 3)
    source = read(path, frame_shape=FRAME)
    assert (source.format, source.kind, source.scan_shape) == ("stempy", "events", SCAN)
    counts = source.read()
    assert isinstance(counts, Events)
    np.testing.assert_array_equal(counts.dense(), flat(some_cube()))
    np.testing.assert_array_equal(source.read(slice(9, 2, -3)).dense(), flat(some_cube())[9:2:-3])


def test_write_stempy(tmp_path):
    cube = some_cube()
    events = events_from_frames(Frames(jnp.asarray(flat(cube))))
    write_stempy(tmp_path / "v3.h5", events, SCAN)
    source = read(tmp_path / "v3.h5")
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    assert [p.name for p in tmp_path.iterdir()] == ["v3.h5"]
    with pytest.raises(InputError, match="needs 10 frames of events, got 15"):
        write_stempy(tmp_path / "v3.h5", events, (2, 5))


def test_a_frame_that_is_not_square_needs_a_shape(v3):
    with pytest.raises(InputError, match=r"v3\.h5.*\(6, 4\) or \(4, 6\)"):
        read(v3)
    with pytest.raises(InputError, match=r"frame_shape=\(3, 8\)"):
        read(v3, frame_shape=(3, 8))


def edit(path, edit):
    with opened(path, "a") as file:
        edit(file)
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f["electron_events/frames"].__setitem__(7, [3, 24]), None),
        (
            lambda f: f["electron_events/scan_positions"].attrs.modify("Ny", 4),
            "15 entries, which is not a multiple of the 20 positions of the 4 × 5 scan",
        ),
        (lambda f: f["electron_events/frames"].attrs.__delitem__("Nx"), "lacks the attribute 'Nx'"),
        (lambda f: f["electron_events"].pop("scan_positions"), "both needed.*frames"),
        (
            lambda f: (
                f.attrs.modify("version", 2)
                or f["electron_events/scan_positions"].__setitem__(4, 99)
            ),
            "position 99 for entry 4, outside the 3 × 5 scan",
        ),
    ],
)
def test_broken_event_files(v3, change, message):
    edit(v3, change)
    if message is not None:
        with pytest.raises(InputError, match=message):
            read(v3, frame_shape=FRAME)
        return
    source = read(v3, frame_shape=FRAME)
    source.read(np.arange(7))
    for reading in (source.read, lambda: describe(source), lambda: check_counts(source)):
        with pytest.raises(InputError, match=r"v3\.h5.*index 24 at scan position 7, .*4 × 6"):
            reading()


def test_only_the_entries_asked_for_are_read(v3, monkeypatch):
    seen = []
    entries = readers.stempy._entries
    monkeypatch.setattr(
        readers.stempy, "_entries", lambda f, wanted: seen.extend(wanted) or entries(f, wanted)
    )
    read(v3, frame_shape=FRAME).read(np.array([11, 3]))
    assert seen == [11, 3]
