"""A pass over frames that share chunks: each position once, each chunk unpacked once."""

import dataclasses
import itertools
import math

import h5py
import numpy as np
import pytest

from smpr3d_jax.data import readers
from smpr3d_jax.data.calibration.signals import gather_signals
from smpr3d_jax.data.readers import read, survey
from smpr3d_jax.data.readers.chunked import gather_chunked, tiles_of
from smpr3d_jax.data.readers.source import Source, Tiles
from smpr3d_jax.data.readers.steps import descanned

from .scan_files import some_cube


FRAME = (4, 6)
SHAPES = [
    ((7, 11), (1, 1)),
    ((7, 11), (1, 4)),
    ((7, 11), (3, 4)),
    ((7, 11), (5, 11)),
    ((7, 11), (7, 2)),
    ((7, 11), (50, 60)),
    ((77,), (5,)),
    ((77,), (1,)),
]


@pytest.fixture
def small(monkeypatch):
    """Groups of a few frames."""

    def set_sizes(usual, most):
        monkeypatch.setattr(readers.source, "TILES_BYTES", usual * math.prod(FRAME))
        monkeypatch.setattr(readers.source, "MOST_BYTES", most * math.prod(FRAME))

    return set_sizes


class Counting:
    """An array in chunks that remembers how often each was needed."""

    def __init__(self, cube, chunks):
        self.cube, self.chunks, self.seen = cube, chunks, {}
        self.shape, self.ndim, self.dtype = cube.shape, cube.ndim, cube.dtype

    def __getitem__(self, item):
        parts = item if isinstance(item, tuple) else (item,)
        used = [
            range(part.start // size, (part.stop - 1) // size + 1)
            for part, size in zip(parts, self.chunks, strict=False)
        ]
        for chunk in itertools.product(*used):
            self.seen[chunk] = self.seen.get(chunk, 0) + 1
        return self.cube[item]


def chunked_source(tmp_path, scan, tile, frame_chunk=FRAME):
    count = math.prod(scan)
    cube = np.random.default_rng(2).poisson(3.0, (*scan, *FRAME)).astype(np.uint8)
    array = Counting(cube, (*tile, *frame_chunk))
    load = lambda positions: gather_chunked(array, positions, array.chunks)
    shape = scan if len(scan) == 2 else (7, count // 7)
    together = tiles_of(array.shape, array.chunks)
    return array, Source(
        tmp_path, "mine", "", shape, FRAME, cube.dtype, "dense", load, together=together
    )  # fmt: skip


@pytest.mark.parametrize("usual", [1, 9, 30, 500])
@pytest.mark.parametrize("scan, tile", SHAPES)
def test_a_pass_takes_each_position_and_each_chunk_once(tmp_path, small, scan, tile, usual):
    small(usual, 80)
    array, source = chunked_source(tmp_path, scan, tile)
    frames = array.cube.reshape(-1, *FRAME)
    seen = np.zeros(len(source), int)
    for positions in source.blocks():
        np.add.at(seen, positions, 1)
        np.testing.assert_array_equal(source.load(positions), frames[positions])
        assert len(positions) <= max(usual, math.prod(tile))
    assert (seen == 1).all()
    assert set(array.seen.values()) == {1}
    assert len(array.seen) == math.prod(-(-n // t) for n, t in zip(scan, tile, strict=True))


def test_chunks_too_large_for_memory_are_unpacked_again(tmp_path, small):
    small(4, 12)
    array, source = chunked_source(tmp_path, (7, 11), (7, 6))
    blocks = list(source.blocks())
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(77))
    assert max(map(len, blocks)) <= 12
    for positions in blocks:
        frames = array.cube.reshape(-1, *FRAME)[positions]
        np.testing.assert_array_equal(source.load(positions), frames)
    # 42 frames of a chunk, 7 at a time.
    assert array.seen == {(0, 0): 6, (0, 1): 5}


@pytest.mark.parametrize("together", [Tiles(2, 3, 11), Tiles(1, 4, 77), Tiles(3, 4, 7)])
def test_what_is_found_does_not_depend_on_the_order(tmp_path, small, together):
    small(3, 80)
    y, x = np.indices((12, 14)) - np.array([6.0, 7.0])[:, None, None]
    disc = np.hypot(y, x)[None] < 4 + np.linspace(0, 0.9, 77)[:, None, None]
    counts = np.random.default_rng(0).poisson(50.0 * disc).astype(np.uint8)
    # Frames that are told apart, of which some are empty.
    counts[[13, 70]] = 0
    np.save(tmp_path / "a.npy", counts.reshape(7, 11, 12, 14))
    plain = read(tmp_path / "a.npy")
    tiled = dataclasses.replace(plain, together=together)
    assert not np.array_equal(np.concatenate(list(tiled.blocks())), np.arange(77)) or (
        together.rows == 1
    )
    one, other = survey(plain), survey(tiled)
    np.testing.assert_array_equal(one.electrons, counts.sum((1, 2)))
    np.testing.assert_array_equal(other.electrons, one.electrons)
    np.testing.assert_array_equal(other.pattern, one.pattern)
    assert np.flatnonzero(other.faulty["empty"]).tolist() == [13, 70]
    a, b = (gather_signals(source, (6.0, 7.0), 4.0) for source in (plain, tiled))
    np.testing.assert_allclose(a.images, b.images, rtol=1e-6)
    a, b = (descanned(source, 1, (6.0, 7.0), 4.0)[1] for source in (plain, tiled))
    np.testing.assert_array_equal(a.shifts, b.shifts)


def test_a_note_on_chunks_of_too_many_frames(tmp_path, monkeypatch):
    cube = some_cube()
    for name, chunks in (("small", (1, 5, 4, 6)), ("large", (3, 5, 2, 3))):
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("a", data=cube, chunks=chunks, compression="gzip")
    monkeypatch.setattr(readers, "MOST_BYTES", 7 * 24)
    assert read(tmp_path / "small").notes == ()
    (note,) = read(tmp_path / "large").notes
    assert note.startswith("15 frames (0 MiB) share their chunks, which a pass over the file unpa")
    assert "unpacks 3 times" in note
