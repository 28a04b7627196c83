"""EMPAD: both ways to open a scan, every place its shape may be in, and what is not believed."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from . import foreign
from .binary_files import empad_xml, save_empad


SCAN = (2, 3)


def some_frames(scan=SCAN, seed=0):
    return np.random.default_rng(seed).poisson(3.0, (*scan, 128, 128)).astype(np.float32)


def flat(cube):
    return cube.reshape(-1, *cube.shape[2:])


@pytest.mark.parametrize("opened", ["scan.xml", "scan_x3_y2.raw"])
def test_a_pair_of_files(tmp_path, opened):
    cube = some_frames()
    save_empad(tmp_path / "scan_x3_y2.raw", cube, empad_xml("scan_x3_y2.raw", SCAN))
    source = read(tmp_path / opened)
    assert (source.format, source.path.name) == ("empad", "scan_x3_y2.raw")
    assert (source.scan_shape, source.frame_shape) == (SCAN, (128, 128))
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    index = np.array([5, 0, 1, 5])
    np.testing.assert_array_equal(source.load(index), flat(cube)[index])
    assert source.facts["energy_ev"] == 300e3
    assert source.facts["exposure_s"] == pytest.approx(2e-3)
    assert source.facts["scan_step_A"] == pytest.approx((3.0, 3.0))
    assert len(source.notes) == 1 and "how many make an electron" in source.notes[0]


def test_a_raw_file_alone(tmp_path):
    cube = some_frames()
    save_empad(tmp_path / "frames.raw", cube)
    with pytest.raises(InputError, match=r"frames.raw: has 6 frames.*`scan_shape`.*product is 6"):
        read(tmp_path / "frames.raw")
    with pytest.raises(InputError, match=r"6 frames.*asks for 8.*product is 6"):
        read(tmp_path / "frames.raw", scan_shape=(2, 4))
    source = read(tmp_path / "frames.raw", scan_shape=(3, 2))
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    assert source.facts == {}
    (tmp_path / "frames.raw").rename(tmp_path / "scan_x3_y2.raw")
    assert read(tmp_path / "scan_x3_y2.raw").scan_shape == SCAN


@pytest.mark.parametrize(
    "said, search, noted",
    [((2, 3), (64, 64), False), ((64, 64), (2, 3), True), ((3, 2), (64, 64), True)],
)
def test_the_shape_that_fits_is_taken(tmp_path, said, search, noted):
    """The instrument may use either of its two sets of parameters, and names the file by it."""
    raw = save_empad(tmp_path / "scan_x3_y2.raw", some_frames())
    raw.with_name("s.xml").write_text(empad_xml(raw.name, said, search=search))
    source = read(tmp_path / "s.xml")
    assert source.scan_shape == SCAN
    assert any("acquire" in note for note in source.notes) == noted


def test_no_shape_fits(tmp_path):
    raw = save_empad(tmp_path / "a.raw", some_frames())
    raw.with_name("a.xml").write_text(empad_xml(raw.name, (7, 5)))
    with pytest.raises(InputError, match=r"6 frames.*\(7, 5\).*acquire.*\(64, 64\).*search"):
        read(raw)
    assert read(raw, scan_shape=SCAN).scan_shape == SCAN


def test_a_disputed_scan_step_is_not_taken(tmp_path):
    """Of peers, some multiply by `scan_size` and some do not."""
    save_empad(tmp_path / "a.raw", some_frames(), empad_xml("a.raw", SCAN, size=0.6))
    source = read(tmp_path / "scan.xml")
    assert "scan_step_A" not in source.facts
    assert any("1.8 Å" in note and "3 Å" in note for note in source.notes)


@pytest.mark.parametrize("view, step", [((6, 4), 2.0), ((6, 6), None)])
def test_older_software(tmp_path, view, step):
    """Sides (x, y) of the field of view, and sizes in pix_x and pix_y."""
    raw = save_empad(tmp_path / "a.raw", some_frames())
    x, y = (side * 1e-10 for side in view)
    raw.with_name("a.xml").write_text(
        '<root><raw_file filename="C:\\data\\a.raw"/><pix_x>3</pix_x><pix_y>2</pix_y>'
        f"<iom_measurements><optics.get_full_scan_field_of_view>[{x}, {y}]"
        "</optics.get_full_scan_field_of_view><source.get_voltage>80000</source.get_voltage>"
        "<calibrated_pixelsize>1.8e-10</calibrated_pixelsize>"
        "<calibrated_diffraction_angle>0.0005</calibrated_diffraction_angle></iom_measurements>"
        "</root>"
    )
    source = read(raw.with_name("a.xml"))
    assert source.facts["energy_ev"] == 80e3
    assert source.facts["detector_pixel_inv_A"] == pytest.approx((0.018, 0.018))
    assert source.facts["detector_pixel_mrad"] == pytest.approx((0.5, 0.5))
    assert source.facts.get("scan_step_A") == (step and pytest.approx((step, step)))
    assert any("differ in shape" in note for note in source.notes) == (step is None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("<root><raw_file filename='b.raw'/></root>", "b.raw, which does not exist"),
        ("<root><raw_file filename='a.raw'>", "cannot be read as XML"),
        ("<!DOCTYPE x []><root><raw_file filename='a.raw'/></root>", "document type"),
        ("<root><x><raw_file filename='a.raw'/></x></root>", "no scan of a first-generation"),
    ],
)
def test_unusable_descriptions(tmp_path, text, message):
    save_empad(tmp_path / "a.raw", some_frames())
    (tmp_path / "scan.xml").write_text(text)
    with pytest.raises(InputError, match=f"scan.xml: .*{message}"):
        read(tmp_path / "scan.xml")
    assert read(tmp_path / "a.raw", scan_shape=SCAN).scan_shape == SCAN


def test_a_file_cut_short(tmp_path):
    raw = save_empad(tmp_path / "scan_x3_y2.raw", some_frames())
    raw.write_bytes(raw.read_bytes()[:-4])
    with pytest.raises(InputError, match="399356 bytes.*not a whole number of EMPAD frames"):
        read(raw)


def test_a_file_that_becomes_shorter(tmp_path):
    raw = save_empad(tmp_path / "scan_x3_y2.raw", some_frames())
    source = read(raw)
    raw.write_bytes(raw.read_bytes()[: 5 * 130 * 128 * 4])
    with pytest.raises(InputError, match="become shorter"):
        source.load(np.arange(6))


PEERS = """
import sys, numpy, warnings
warnings.simplefilter("ignore")
xml, out = sys.argv[1:]
from rsciio.empad import file_reader
found = file_reader(xml)[0]
import libertem.api as lt
context = lt.Context.make_with("inline")
data = context.load("empad", path=xml)
from libertem.udf import UDF
class Copy(UDF):
    def get_result_buffers(self):
        return {"frame": self.buffer(kind="nav", extra_shape=(128 * 128,), dtype="float32")}
    def process_frame(self, frame):
        self.results.frame[:] = frame.ravel()
copied = context.run_udf(data, Copy())["frame"].data
axes = {a["name"]: (a["scale"], str(a["units"])) for a in found["axes"]}
numpy.savez(out, rsciio=found["data"], libertem=copied, axes=repr(axes))
"""


@pytest.mark.slow
def test_peers_read_the_same(tmp_path):
    """Checked with rosettasciio 0.15.0 and LiberTEM 0.16.0."""
    cube = some_frames((4, 3))
    save_empad(tmp_path / "scan_x3_y4.raw", cube, empad_xml("scan_x3_y4.raw", (4, 3)))
    python = foreign.python_with("rosettasciio", "libertem")
    foreign.run(python, PEERS, tmp_path / "scan.xml", tmp_path / "peers.npz")
    source = read(tmp_path / "scan.xml")
    peers = np.load(tmp_path / "peers.npz")
    frames = np.asarray(source.read().dense())
    np.testing.assert_array_equal(peers["libertem"].reshape(frames.shape), frames)
    np.testing.assert_array_equal(peers["rsciio"].reshape(frames.shape), frames)
    axes = eval(str(peers["axes"]))
    assert axes["scan_y"] == axes["scan_x"] == (pytest.approx(300), "pm")
