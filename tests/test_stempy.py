"""Electron events of every version, as they are left on disk."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data import readers
from smpr3d_jax.data.counts import Events, events_from_frames, Frames, InputError
from smpr3d_jax.data.events import EventRows
from smpr3d_jax.data.readers import check_counts, describe, read, stempy, write_stempy

from . import foreign
from .scan_files import flat, FRAME, lists_of, opened, save_events, SCAN, some_cube, split_entries
from .test_events import shuffled


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


@pytest.mark.parametrize("hits", [1, 3])
def test_write_lists_of_one_length(tmp_path, hits):
    cube = np.zeros((2, 3, 4, 5), np.uint8)
    cube[:, :, 1, :hits] = 1
    write_stempy(tmp_path / "e.h5", events_from_frames(Frames(jnp.asarray(flat(cube)))), (2, 3))
    np.testing.assert_array_equal(read(tmp_path / "e.h5").read().dense(), flat(cube))


def test_write_a_scan_in_parts(tmp_path):
    """A pixel hit n times is in n lists of its position; every list has a pixel once."""
    cube, facts = some_cube(mean=0.8), {"scan_step_A": (0.5, 0.25), "energy_ev": 80e3}
    rows = shuffled(flat(cube))
    path = tmp_path / "parts.h5"
    with stempy.writing(path, SCAN, FRAME, int(cube.max()), {**facts, "other": "x"}) as append:
        append(rows[:4])
        append(rows[4:5])
        append(rows[5:])
    source = read(path)
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    assert source.facts == facts
    with opened(path) as file:
        lists = file["electron_events/frames"][()]
    assert len(lists) == 15 * cube.max()
    assert all(np.all(np.diff(entry.astype(int)) > 0) for entry in lists)
    with (
        pytest.raises(InputError, match="a pixel was hit 1000 times"),
        stempy.writing(path, SCAN, FRAME, 1000),
    ):
        pass


@pytest.mark.parametrize("version", [2, 3])
def test_flyback(tmp_path, version):
    """The last column goes, whatever the order of the entries."""
    cube = some_cube()
    entries, positions = split_entries(cube)
    if version == 3:
        entries = [half for e in lists_of(cube) for half in (e[:4], e[4:])]
    path = save_events(tmp_path / "a.h5", entries, positions, version)
    source = read(path, frame_shape=FRAME, drop_flyback=True)
    assert source.scan_shape == (3, 4)
    np.testing.assert_array_equal(source.read().dense(), flat(cube[:, :-1]))
    index = np.array([11, 4, 4])
    np.testing.assert_array_equal(source.read(index).dense(), flat(cube[:, :-1])[index])
    narrow = save_events(tmp_path / "b.h5", lists_of(cube[:, :1]), np.arange(3), 3, (3, 1))
    with pytest.raises(InputError, match="without a column to drop"):
        read(narrow, frame_shape=FRAME, drop_flyback=True)
    np.save(tmp_path / "c.npy", cube)
    for named in ({}, {"format": "arrays"}):
        with pytest.raises(InputError, match=r"c\.npy: its format takes no hint 'drop_flyback'"):
            read(tmp_path / "c.npy", drop_flyback=True, **named)


def test_scattered_positions_of_a_long_scan(tmp_path):
    """Near entries are read in one piece, far ones apart, and each comes to its place."""
    rng = np.random.default_rng(0)
    entries = [rng.integers(0, 24, rng.integers(0, 5)).astype(np.uint32) for _ in range(1000)]
    path = save_events(tmp_path / "a.h5", entries, np.arange(1000), 3, (20, 50))
    source = read(path, frame_shape=FRAME)
    for index in (rng.permutation(1000)[:30], np.array([999, 0, 500, 501, 0]), np.arange(7, 9)):
        rows = source.host(index)
        assert isinstance(rows, EventRows)
        found = np.split(rows.pixels, rows.indptr[1:-1])
        assert all(np.array_equal(a, entries[i]) for a, i in zip(found, index, strict=True))


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
        (lambda f: f.attrs.modify("version", 7), "of version 7, but 1, 2 and 3 are known"),
        (
            lambda f: f["electron_events/scan_positions"].attrs.modify("Nx", -5),
            "attribute 'Nx' of .*scan_positions.* is -5; a whole number above 0",
        ),
        (
            lambda f: f["electron_events/frames"].attrs.modify("Nx", 2**31),
            "by 2147483648 pixels|2147483648 by",
        ),
        (
            lambda f: (
                f.attrs.modify("version", 2)
                or f["electron_events/scan_positions"].attrs.modify("Nx", 10**9)
            ),
            "there are only 15 entries",
        ),
    ],
)
def test_broken_event_files(v3, change, message):
    edit(v3, change)
    if message is not None:
        with pytest.raises(InputError, match=message):
            read(v3, frame_shape=(6, 2**31) if "2147483648" in message else FRAME)
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


def peer_dense(python, path, target):
    """What stempy itself finds in a file, as an array of frames in its order of the sizes."""
    script = """
        import sys, numpy as np
        from stempy.io import SparseArray
        np.save(sys.argv[2], SparseArray.from_hdf5(sys.argv[1]).to_dense())
    """
    foreign.run(python, script, path, target)
    return np.load(target)


@pytest.mark.slow
def test_stempy_reads_what_we_write(tmp_path):
    cube = some_cube(mean=0.8)
    write_stempy(tmp_path / "a.h5", shuffled(flat(cube)), SCAN, {"energy_ev": 80e3})
    found = peer_dense(foreign.python_with("stempy"), tmp_path / "a.h5", tmp_path / "found.npy")
    np.testing.assert_array_equal(found, cube)


@pytest.mark.slow
@pytest.mark.parametrize("per_position", [1, 3])
def test_we_read_what_stempy_writes(tmp_path, per_position):
    script = """
        import sys, numpy as np
        from stempy.io import SparseArray
        rng, each = np.random.default_rng(0), int(sys.argv[3])
        data = np.empty((15, each), object)
        for i in np.ndindex(15, each):
            data[i] = np.flatnonzero(rng.random(49) < 0.2).astype(np.uint32)
        scan = SparseArray(data, scan_shape=(3, 5), frame_shape=(7, 7))
        scan.write_to_hdf5(sys.argv[1])
        np.save(sys.argv[2], scan.to_dense())
    """
    python = foreign.python_with("stempy")
    foreign.run(python, script, tmp_path / "a.h5", tmp_path / "a.npy", per_position)
    source = read(tmp_path / "a.h5")
    assert (source.scan_shape, source.frame_shape) == (SCAN, (7, 7))
    np.testing.assert_array_equal(source.read().dense(), flat(np.load(tmp_path / "a.npy")))


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_we_find_in_old_files_what_stempy_finds(tmp_path, version):
    """Stempy takes the entries of version 1 in their order, whatever their positions say."""
    cube = some_cube()
    square = np.zeros((*SCAN, 6, 6), np.uint8)
    square[..., :4, :] = cube
    entries, positions = split_entries(square)
    # A pixel counts once an entry of version 2.
    entries = [np.unique(e) for e in entries]
    if version == 1:
        entries, positions = lists_of(square), np.arange(15)
    path = save_events(tmp_path / "a.h5", entries, positions, version, frame=(6, 6))
    found = peer_dense(foreign.python_with("stempy"), path, tmp_path / "found.npy")
    np.testing.assert_array_equal(read(path).read().dense(), flat(found))
