"""DigitalMicrograph: which dimensions are the scan, what the tags say, and damaged tags."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from . import foreign
from .binary_files import dm_image, dm_scan, dm_thumbnail, DmWriter, save_dm
from .scan_files import flat, FRAME, SCAN, some_cube


INDEX = np.array([14, 3, 4, 3, 5])
ANGLE = "Convergence semi-angle (mrad)"
TAGS = {
    "Microscope Info": {"Voltage": 80e3, "STEM Camera Length": 285.0},
    "EELS": {"Experimental Conditions": {ANGLE: 21.5}},
    "SI": {"Acquisition": {"Pixel time (s)": 0.002}},
}

SAMPLING = {"Height (pixels)": 3, "Width (pixels)": 5}


def swapped_tag(value):
    return {"Meta Data": {"Data Order Swapped": value, "Format": "Diffraction image"}}


@pytest.mark.parametrize("version, little", [(4, True), (3, True), (4, False)])
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("dtype", ["u2", "u1", "i4", "f4"])
def test_both_orders(tmp_path, version, little, swapped, dtype):
    cube = some_cube(dtype=dtype)
    tags = TAGS | (swapped_tag(True) if swapped else {})
    images = [dm_thumbnail(), dm_scan(cube, swapped, tags)]
    source = read(save_dm(tmp_path / "a.dm4", images, version, little))
    assert (source.format, source.scan_shape, source.frame_shape) == ("dm", SCAN, FRAME)
    assert source.dtype == dtype
    np.testing.assert_array_equal(source.load(np.arange(15)), flat(cube))
    np.testing.assert_array_equal(source.load(INDEX), flat(cube)[INDEX])
    np.testing.assert_array_equal(source.read(slice(4, 11)).dense(), flat(cube)[4:11])
    assert len(source.load(np.zeros(0, int))) == 0
    expected = {
        "scan_step_A": (0.05, 4.0),
        "detector_pixel_inv_A": (0.02, 0.01),
        "energy_ev": 80e3,
        "semiangle_mrad": 21.5,
        "exposure_s": 0.002,
    }
    assert source.facts == {key: pytest.approx(value) for key, value in expected.items()}
    assert len(source.notes) == (0 if swapped else 1)
    assert swapped or "slow to read" in source.notes[0]


def plain(cube, swapped, tags=None):
    """Without units."""
    image = dm_scan(cube, swapped, tags)
    for axis in image["ImageData"]["Calibrations"]["Dimension"]:
        axis["Units"] = ""
    return image


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize(
    "hints, tags",
    [
        ({"scan_shape": SCAN}, {}),
        ({"frame_shape": FRAME}, {}),
        ({"data_order_swapped": ...}, {}),
        ({}, {"SI": {"Acquisition": {"Spatial Sampling": SAMPLING}}}),
        ({}, {"Meta Data": {"Data Order Swapped": ...}}),
    ],
)  # fmt: skip
def test_what_tells_the_order(tmp_path, swapped, hints, tags):
    cube = some_cube(dtype="u2")
    hints = {key: swapped if value is ... else value for key, value in hints.items()}
    if "Meta Data" in tags:
        tags = swapped_tag(swapped)
    source = read(save_dm(tmp_path / "a.dm4", [plain(cube, swapped, tags)]), **hints)
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.load(INDEX), flat(cube)[INDEX])
    assert source.facts == {}


def test_nothing_tells_the_order(tmp_path):
    path = save_dm(tmp_path / "a.dm4", [plain(some_cube(dtype="u2"), True)])
    with pytest.raises(
        InputError, match=r"a.dm4: .*\(3, 5, 4, 6\).*data_order_swapped=True.*\(3, 5\)"
    ):
        read(path)


def test_tag_against_units(tmp_path):
    cube = some_cube(dtype="u2")
    path = save_dm(tmp_path / "a.dm4", [dm_scan(cube, True, swapped_tag(False))])
    source = read(path)
    assert source.scan_shape == FRAME and source.frame_shape == SCAN
    assert any("units of the axes say the opposite" in note for note in source.notes)
    assert "scan_step_A" not in source.facts
    assert read(path, data_order_swapped=True).scan_shape == SCAN


def test_a_stack_of_frames(tmp_path):
    cube = some_cube(dtype="u2")
    image = dm_image(flat(cube), (0.3, 0.4, 1.0), ("mrad", "mrad", ""))
    path = save_dm(tmp_path / "a.dm3", [dm_thumbnail(), image], 3)
    with pytest.raises(InputError, match="stack of 15 frames.*`scan_shape`"):
        read(path)
    source = read(path, scan_shape=SCAN)
    np.testing.assert_array_equal(source.load(INDEX), flat(cube)[INDEX])
    assert source.facts == {"detector_pixel_mrad": pytest.approx((0.4, 0.3))}
    image["ImageTags"]["4D STEM Tags"] = {"Scan shape X": 5, "Scan shape Y": 3}
    source = read(save_dm(path, [image], 3))
    assert source.scan_shape == SCAN and "late by two" in source.notes[0]


def test_one_of_several_images(tmp_path):
    images = [dm_thumbnail()]
    images += [
        dm_scan(some_cube(i, "u2"), True, swapped_tag(True), name=n) for i, n in enumerate("ab")
    ]
    path = save_dm(tmp_path / "a.dm4", images)
    with pytest.raises(InputError, match="2 images of frames: '1 a' .*'2 b'"):
        read(path)
    for dataset in ("b", "2", "2 b"):
        source = read(path, dataset=dataset)
        np.testing.assert_array_equal(source.load(INDEX), flat(some_cube(1, "u2"))[INDEX])
    with pytest.raises(InputError, match="no image 'c'.*'1 a'"):
        read(path, dataset="c")


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "no image of three or four dimensions; it has none"),
        ([dm_thumbnail()], "no image of three or four"),
        ([dm_image(np.zeros((9, 4, 6), "f4"), (1, 1, 1), ("nm", "nm", "eV"),
                   {"Meta Data": {"Format": "Spectrum image"}})], "no image of three or four"),
    ],
)  # fmt: skip
def test_files_without_frames(tmp_path, images, message):
    with pytest.raises(InputError, match=f"a.dm4: .*{message}"):
        read(save_dm(tmp_path / "a.dm4", images))


def test_counts_in_electrons(tmp_path):
    image = dm_scan(some_cube(dtype="u2"), True, swapped_tag(True))
    brightness = image["ImageData"]["Calibrations"]["Brightness"]
    brightness |= {"Scale": 0.25, "Units": "e-"}
    source = read(save_dm(tmp_path / "a.dm4", [image]))
    assert source.facts["counts_per_electron"] == 4


def test_every_truncation_is_noticed(tmp_path):
    data = DmWriter().file({"ImageList": [dm_scan(some_cube(dtype="u2"), True, swapped_tag(True))]})
    for length in range(25, len(data) - 8, 41):
        (tmp_path / "a.dm4").write_bytes(data[:length])
        with pytest.raises(InputError, match="a.dm4: the tags .*cut short"):
            read(tmp_path / "a.dm4")


def test_sizes_that_contradict_each_other(tmp_path):
    image = dm_scan(some_cube(dtype="u2"), True, swapped_tag(True))
    image["ImageData"]["Dimensions"][3] = 4
    with pytest.raises(InputError, match="6 × 4 × 5 × 4 numbers uint16, 960 bytes, but has 720"):
        read(save_dm(tmp_path / "a.dm4", [image]))


READ = """
import sys, numpy, ncempy.io.dm
from rsciio.digitalmicrograph import file_reader
path, out = sys.argv[1:]
with ncempy.io.dm.fileDM(path) as file:
    found = file.getDataset(0)
    voltage = [v for k, v in file.allTags.items() if k.endswith("Microscope Info.Voltage")]
steps, units = found["pixelSize"], found["pixelUnit"]
image = file_reader(path)[-1]
axes = [(a["scale"], str(a["units"])) for a in image["axes"]]
numpy.savez(out, ncempy=found["data"], rsciio=image["data"], voltage=voltage,
            ncempy_steps=steps, rsciio_steps=[a[0] for a in axes],
            ncempy_units=units, rsciio_units=[a[1] for a in axes])
"""


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("version", [3, 4])
def test_peers_read_the_same(tmp_path, swapped, version):
    """Of our writer; checked with ncempy 1.16 and rosettasciio 0.15.0, which keep the order."""
    cube = some_cube(dtype="u2")
    images = [dm_thumbnail(), dm_scan(cube, swapped, TAGS | swapped_tag(swapped))]
    path = save_dm(tmp_path / f"a.dm{version}", images, version)
    python = foreign.python_with("rosettasciio", "ncempy")
    foreign.run(python, READ, path, tmp_path / "peers.npz")
    peers, source = np.load(tmp_path / "peers.npz"), read(path)
    frames = source.load(np.arange(15)).reshape(*SCAN, *FRAME)
    order = (0, 1, 2, 3) if swapped else (2, 3, 0, 1)
    for peer in ("ncempy", "rsciio"):
        np.testing.assert_array_equal(np.transpose(peers[peer], order), frames)
        steps = [float(peers[f"{peer}_steps"][i]) for i in order]
        assert steps == pytest.approx([5.0, 4.0, 0.2, 0.1])
        assert [str(peers[f"{peer}_units"][i]) for i in order] == ["pm", "Å", "1/nm", "1/nm"]
    assert source.facts["energy_ev"] == peers["voltage"]


WRITE = """
import sys, numpy
from nion.data import Calibration, DataAndMetadata
from nionswift_plugin.DM_IO import dm3_image_utils
array, out, version, swapped = sys.argv[1:]
data = numpy.load(array)
units = ["nm", "nm", "1/nm", "1/nm"] if int(swapped) else ["1/nm", "1/nm", "nm", "nm"]
steps = [0.3, 0.2, 0.04, 0.05] if int(swapped) else [0.04, 0.05, 0.3, 0.2]
image = DataAndMetadata.new_data_and_metadata(
    data,
    dimensional_calibrations=[Calibration.Calibration(0, s, u) for s, u in zip(steps, units)],
    metadata={"Meta Data": {"Data Order Swapped": bool(int(swapped))},
              "Microscope Info": {"Voltage": 60000.0, "Name": "a"}},
    data_descriptor=DataAndMetadata.DataDescriptor(False, 2, 2),
)
with open(out, "wb") as file:
    dm3_image_utils.save_image(image, file, int(version))
"""


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("version", [3, 4])
def test_files_that_nion_swift_writes(tmp_path, swapped, version):
    """An independent writer; checked with nionswift-io 15.5.0."""
    cube = some_cube(dtype="u2")
    np.save(tmp_path / "a.npy", cube if swapped else np.transpose(cube, (2, 3, 0, 1)))
    python = foreign.python_with("nionswift-io", "nionswift")
    arguments = (tmp_path / "a.npy", tmp_path / "a.dm4", version, int(swapped))
    foreign.run(python, WRITE, *arguments)
    source = read(tmp_path / "a.dm4")
    np.testing.assert_array_equal(source.load(np.arange(15)), flat(cube))
    assert source.facts["energy_ev"] == 60e3
    assert source.facts["scan_step_A"] == pytest.approx((3.0, 2.0))
    assert source.facts["detector_pixel_inv_A"] == pytest.approx((0.004, 0.005))
