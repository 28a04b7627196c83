"""Merlin: every kind of pixel, chips put together, and frames that do not belong to the scan."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from . import foreign
from .binary_files import mib_hdr, save_mib


SCAN = (3, 5)
BITS = {"U08": 8, "U16": 16, "U32": 24}


def some_frames(shape, bits, scan=SCAN, seed=0):
    """Counts of all sizes, different in every pixel's neighbourhood."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**bits, (*scan, *shape), np.uint32)


def flat(cube):
    return cube.reshape(-1, *cube.shape[2:])


@pytest.mark.parametrize("kind", BITS)
def test_assembled_frames(tmp_path, kind):
    cube = some_frames((16, 24), BITS[kind])
    path = save_mib(tmp_path / "a.mib", cube, kind)
    source = read(path, scan_shape=SCAN)
    assert (source.format, source.scan_shape, source.frame_shape) == ("mib", SCAN, (16, 24))
    assert source.dtype == {"U08": "u1", "U16": "u2", "U32": "u4"}[kind]
    assert source.facts == {"exposure_s": pytest.approx(1.5e-3)}
    assert (source.notes, source.mask) == ((), None)
    np.testing.assert_array_equal(source.load(np.arange(15)), flat(cube))
    index = np.array([14, 0, 1, 14, 7])
    np.testing.assert_array_equal(source.load(index), flat(cube)[index])
    np.testing.assert_array_equal(source.read(index).dense(), flat(cube)[index])


@pytest.mark.parametrize("depth", [1, 6, 12, 24])
@pytest.mark.parametrize("layout", ["1x1", "2x2", "2x2G"])
def test_raw_frames(tmp_path, depth, layout):
    """The writer packs with shifts of words, the reader reverses bytes."""
    chips, side = (1, 64) if layout == "1x1" else (4, 128)
    cube = some_frames((side, side), depth)
    path = save_mib(tmp_path / "a.mib", cube, "R64", layout, depth, chips)
    source = read(path, scan_shape=SCAN)
    frames = source.load(np.arange(15))
    assert frames.dtype == source.dtype
    if layout != "2x2G":
        assert source.mask is None
        np.testing.assert_array_equal(frames, flat(cube))
        return
    assert source.mask is not None
    assert source.frame_shape == source.mask.shape == (130, 130)
    gap = np.zeros(130, bool)
    gap[64:66] = True
    np.testing.assert_array_equal(~source.mask, gap[:, None] | gap)
    np.testing.assert_array_equal(frames[:, source.mask], flat(cube).reshape(15, -1))
    assert not frames[:, ~source.mask].any()


def test_assembled_frames_with_a_gap(tmp_path):
    hdr = mib_hdr(1, 1, "ScanX:\t1", "ScanY:\t1", "Gap Fill Mode:\tDistribute")
    cube = some_frames((514, 514), 8, (1, 1))
    path = save_mib(tmp_path / "a.mib", cube, "U08", "2x2G", 6, 4, hdr=hdr)
    source = read(path)
    gap = (np.arange(514) >= 256) & (np.arange(514) < 258)
    assert source.mask is not None
    np.testing.assert_array_equal(~source.mask, gap[:, None] | gap)
    assert any("Distribute" in note for note in source.notes)
    np.testing.assert_array_equal(source.load(np.arange(1))[0], cube[0, 0])


@pytest.mark.parametrize("opened", ["a.hdr", "a.mib"])
@pytest.mark.parametrize("more", [(), ("ScanX:\t3", "ScanY:\t5")])
def test_the_scan_shape_of_the_hdr_file(tmp_path, opened, more):
    cube = some_frames((8, 8), 8)
    save_mib(tmp_path / "a.mib", cube, hdr=mib_hdr(15, 5, *more))
    source = read(tmp_path / opened)
    assert source.scan_shape == ((5, 3) if more else SCAN)
    assert source.path.name == "a.mib"
    assert read(tmp_path / opened, scan_shape=(15, 1)).scan_shape == (15, 1)


@pytest.mark.parametrize("per_trigger", [1, 15, 4])
def test_triggers_that_say_nothing_of_rows(tmp_path, per_trigger):
    save_mib(tmp_path / "a.mib", some_frames((8, 8), 8), hdr=mib_hdr(15, per_trigger))
    with pytest.raises(InputError, match="a.mib: has 15 frames.*`scan_shape`.*product is 15"):
        read(tmp_path / "a.hdr")


def test_frames_before_the_scan(tmp_path):
    cube = some_frames((8, 8), 8, (1, 16))
    path = save_mib(tmp_path / "a.mib", cube)
    with pytest.raises(InputError, match="has 16 frames.*3 × 5 takes 15.*`skip`.*of the 1 others"):
        read(path, scan_shape=SCAN)
    for skip, note in (
        (1, "1 frames before the scan and 0"),
        (0, "0 frames before the scan and 1"),
    ):
        source = read(path, scan_shape=SCAN, skip=skip)
        np.testing.assert_array_equal(source.load(np.arange(15)), flat(cube)[skip : 15 + skip])
        assert note in source.notes[0]
    with pytest.raises(InputError, match="after 2 takes 17.*at most 2, and skip=2"):
        read(path, scan_shape=SCAN, skip=2)
    with pytest.raises(InputError, match="skip=-1.*cannot be"):
        read(path, scan_shape=SCAN, skip=-1)


@pytest.mark.parametrize("last", [True, False])
def test_frames_after_each_row(tmp_path, last):
    cube = some_frames((8, 8), 8, (3, 7))
    path = save_mib(tmp_path / "a.mib", flat(cube)[: 21 if last else 19][:, None])
    source = read(path, scan_shape=SCAN, flyback=2)
    np.testing.assert_array_equal(source.load(np.arange(15)), cube[:, :5].reshape(15, 8, 8))
    index = np.array([9, 4, 5])
    np.testing.assert_array_equal(source.load(index), cube[:, :5].reshape(15, 8, 8)[index])


def test_a_scan_that_was_stopped(tmp_path):
    path = save_mib(tmp_path / "a.mib", some_frames((8, 8), 8), hdr=mib_hdr(30, 5))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="has 14 frames.*6 × 5 takes 30.*at most 2, and skip=0"):
        read(path)
    source = read(path, scan_shape=(2, 5), skip=0)
    assert any("cut short: 502 bytes" in note for note in source.notes)
    assert any("0 frames before the scan and 4" in note for note in source.notes)


def test_what_the_headers_tell(tmp_path):
    cube = some_frames((8, 8), 8)
    path = save_mib(tmp_path / "a.mib", cube, number=7)
    assert read(path, scan_shape=SCAN).notes == ()
    data, stride = path.read_bytes(), 384 + 128
    path.write_bytes(data[: 3 * stride] + data[4 * stride :])
    notes = read(path, scan_shape=(2, 7)).notes
    assert notes == ("frames are numbered 7 to 21, but are 14",)
    path.write_bytes(data[: 2 * stride] + data[2 * stride + 4 :] + b"1234")
    with pytest.raises(InputError, match="byte 7168 should begin the header"):
        read(path, scan_shape=SCAN)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b",00384,", b",00000,", "says None bytes of header"),
        (b",00384,", b",99999,", "says 99999 bytes of header"),
        (b",0008,0008,", b",9999,9999,", "less than one frame of 199960386"),
        (b",U16,", b",F16,", "pixels of kind 'F16'"),
        (b",U16,", b",R64,", "cannot be assembled"),
    ],
)
def test_impossible_headers(tmp_path, old, new, message):
    path = save_mib(tmp_path / "a.mib", some_frames((8, 8), 8))
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(InputError, match=f"a.mib: .*{message}"):
        read(path, scan_shape=SCAN)


def test_an_hdr_file_without_frames(tmp_path):
    (tmp_path / "a.hdr").write_bytes(mib_hdr(15, 5))
    with pytest.raises(InputError, match="a.hdr: .*but 0 have its name: none"):
        read(tmp_path / "a.hdr")
    for name in ("a1.mib", "a2.mib"):
        save_mib(tmp_path / name, some_frames((8, 8), 8))
    with pytest.raises(InputError, match="2 have its name: a1.mib, a2.mib"):
        read(tmp_path / "a.hdr")


PEERS = """
import sys, numpy, warnings
warnings.simplefilter("ignore")
out, ny, nx, *paths = sys.argv[1:]
import libertem.api as lt
from libertem.io.dataset.base import BufferedBackend
from libertem.udf import UDF
from rsciio.quantumdetector import file_reader
class Copy(UDF):
    def get_result_buffers(self):
        size = int(numpy.prod(self.meta.dataset_shape.sig))
        return {"frame": self.buffer(kind="nav", extra_shape=(size,), dtype="uint32")}
    def process_frame(self, frame):
        self.results.frame[:] = frame.ravel()
    def get_preferred_input_dtype(self):
        return numpy.uint32
context, found = lt.Context.make_with("inline"), {}
for path in paths:
    shape = (int(ny), int(nx))
    try:
        # Its other back ends take a frame of 1 bit for one of 64 and refuse the file.
        backend = BufferedBackend()
        data = context.load(
            "mib", path=path, nav_shape=shape, disable_glob=True, io_backend=backend
        )
        frames = context.run_udf(data, Copy())["frame"].data.reshape(-1, *data.shape.sig)
        found["libertem " + path] = frames
    except Exception as error:
        found["libertem " + path] = repr(error)
    try:
        frames = file_reader(path, navigation_shape=shape[::-1])[0]["data"]
        found["rsciio " + path] = frames.reshape(-1, *frames.shape[-2:])
    except Exception as error:
        found["rsciio " + path] = repr(error)
numpy.savez(out, **found)
"""


@pytest.mark.slow
def test_peers_read_the_same(tmp_path):
    """Checked with rosettasciio 0.15.0 (upside down, no raw) and LiberTEM 0.16.0 (no gap).

    Of raw frames of 24 bits LiberTEM has only the first where the format has it.
    """
    ours, scan = {}, (2, 3)
    for kind, bits in BITS.items():
        cube = some_frames((256, 256), bits, scan)
        path = save_mib(tmp_path / f"{kind}.mib", cube, kind, hdr=mib_hdr(6, 3))
        ours[str(path)] = flat(cube)
    for depth in (1, 6, 12, 24):
        for layout in ("1x1", "2x2", "2x2G"):
            chips, side = (1, 256) if layout == "1x1" else (4, 512)
            cube = some_frames((side, side), depth, scan)
            path = tmp_path / f"R{depth}_{layout}.mib"
            save_mib(path, cube, "R64", layout, depth, chips, hdr=mib_hdr(6, 3))
            source = read(path)
            frames = source.load(np.arange(6))
            if source.mask is not None:
                frames = frames[:, source.mask].reshape(6, 512, 512)
            ours[str(path)] = frames
    python = foreign.python_with("rosettasciio", "libertem")
    foreign.run(python, PEERS, tmp_path / "peers.npz", *scan, *ours)
    peers = np.load(tmp_path / "peers.npz")
    for path, frames in ours.items():
        theirs = peers[f"libertem {path}"]
        if "R24_2x2" in path:
            assert "not implemented" in str(theirs)
        else:
            same = slice(1) if "R24" in path else slice(None)
            np.testing.assert_array_equal(theirs[same], frames[same], path)
        if "U" in path.rsplit("/", 1)[1]:
            np.testing.assert_array_equal(peers[f"rsciio {path}"][:, ::-1], frames, path)
