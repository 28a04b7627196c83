"""Master files: frames across files, the mask, and what is said when a part is missing."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from .foreign import python_with, run
from .scan_files import flat, FRAME, opened, SCAN
from .tree_files import CHANNELS, counts, link, MASKED, save_channels, save_dectris, the_mask


def unmasked(cube):
    frames = flat(cube).copy()
    for pixel in MASKED:
        frames[:, *pixel] = 0
    return frames


@pytest.fixture
def master(tmp_path):
    cube = counts()
    for pixel in MASKED:
        cube[:, :, *pixel] = 65535
    save_dectris(tmp_path / "scan_master.h5", cube)
    return tmp_path / "scan_master.h5"


def test_frames_across_files(master):
    with pytest.raises(InputError, match="stack of 15 frames.*`scan_shape`"):
        read(master)
    source = read(master, scan_shape=SCAN)
    assert (source.format, source.frame_shape, source.dtype) == ("dectris", FRAME, np.uint16)
    np.testing.assert_array_equal(source.read().dense(), unmasked(counts()))
    index = np.array([14, 3, 4, 3, 9, 8])
    np.testing.assert_array_equal(source.read(index).dense(), unmasked(counts())[index])
    assert len(source.read(np.zeros(0, int))) == 0


def test_facts_and_mask(master):
    source = read(master, scan_shape=SCAN)
    assert source.facts == {"energy_ev": 8e4, "exposure_s": 1e-5}
    np.testing.assert_array_equal(source.mask, the_mask() == 0)
    assert source.notes == (
        "2 pixels are masked and read as 0",
        "counts above 60000 are overloads; compare them with the largest count",
    )


def test_only_the_files_asked_for_are_read(master):
    source = read(master, scan_shape=SCAN)
    (master.parent / "scan_data_000001.h5").unlink()
    (master.parent / "scan_data_000003.h5").write_bytes(b"gone")
    np.testing.assert_array_equal(source.read(np.arange(4, 9)).dense(), unmasked(counts())[4:9])
    with pytest.raises(InputError, match=r"scan_data_000003\.h5: cannot be read as HDF5"):
        source.read(np.array([10]))


@pytest.mark.parametrize("external", [True, False])
def test_rows_that_were_triggered(tmp_path, external):
    path = tmp_path / "s.h5"
    save_dectris(path, counts(), triggers=SCAN, external=external, mask=False)
    source = read(path)
    assert source.scan_shape == SCAN
    assert source.mask is None
    assert "a row of the scan is a trigger: 3 of 5 images" in source.notes
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    assert read(path, scan_shape=(5, 3)).scan_shape == (5, 3)


def test_fewer_frames_than_planned(tmp_path):
    save_dectris(tmp_path / "s.h5", counts(), triggers=(4, 5))
    with pytest.raises(InputError, match="15 frames"):
        read(tmp_path / "s.h5")
    notes = read(tmp_path / "s.h5", scan_shape=SCAN).notes
    assert "4 triggers of 5 images were planned, but there are 15 images" in notes


def test_a_link_whose_name_is_out_of_date(master):
    with opened(master, "a") as file:
        del file["entry/data/data_000002"]
        file["entry/data/data_000002"] = link("D:\\arina\\scan_data_000002.h5")
    source = read(master, scan_shape=SCAN)
    np.testing.assert_array_equal(source.read().dense(), unmasked(counts()))


def test_the_step_from_the_file_of_the_scan(master):
    with opened(master.parent / "scan.h5", "w") as file:
        file.create_group("STEM Metadata").attrs["Pixel Size"] = [0.04, 0.04]
    assert read(master, scan_shape=SCAN).facts["scan_step_A"] == (0.4, 0.4)
    (master.parent / "scan.h5").write_bytes(b"\x89HDF\r\n\x1a\n rest")
    source = read(master, scan_shape=SCAN)
    assert "scan_step_A" not in source.facts
    assert any("scan.h5: cannot be read" in note for note in source.notes)


def remove_second(path):
    (path.parent / "scan_data_000002.h5").unlink()


def another_size(path):
    with opened(path.parent / "scan_data_000002.h5", "w") as file:
        file["entry/data/data"] = np.zeros((5, 6, 4), np.uint16)


def another_name(path):
    with opened(path.parent / "scan_data_000002.h5", "w") as file:
        file["data"] = np.zeros((5, 6, 4), np.uint16)


@pytest.mark.parametrize(
    "change, hints, message",
    [
        (remove_second, {}, r"scan_master\.h5: .*scan_data_000002\.h5, which is missing; copy"),
        (another_size, {}, r"scan_data_000002\.h5: .*\(5, 6, 4\).*but the stack before"),
        (another_name, {}, r"scan_data_000002\.h5: there is no dataset .*/data \(5, 6, 4\)"),
        (None, {"dataset": "entry/data"}, "leave out"),
        (None, {"channel": "threshold_1"}, "has no channels"),
        (None, {"frame_shape": (6, 4)}, r"\(4, 6\).*\(6, 4\)"),
    ],
)
def test_what_cannot_be_read(master, change, hints, message):
    if change:
        change(master)
    with pytest.raises(InputError, match=message):
        read(master, scan_shape=SCAN, **hints)


def test_a_mask_that_does_not_fit(master):
    with opened(master, "a") as file:
        del file["entry/instrument/detector/detectorSpecific/pixel_mask"]
        file["entry/instrument/detector/detectorSpecific/pixel_mask"] = the_mask().T
    source = read(master, scan_shape=SCAN)
    assert source.mask is None
    assert "the pixel mask (6, 4) does not fit the frames and is not used" in source.notes


@pytest.mark.parametrize("channel", [None, *CHANNELS])
def test_channels(tmp_path, channel):
    """Four axes, of which the second is no part of the scan."""
    path, cube = tmp_path / "series_1_master.h5", counts()
    save_channels(path, cube)
    source = read(path, scan_shape=SCAN, channel=channel)
    expected = {"threshold_2": unmasked(cube // 2), "difference": flat(cube - cube // 2)}
    np.testing.assert_array_equal(source.read().dense(), expected.get(channel, flat(cube)))
    assert source.facts == {"exposure_s": 2e-5, "center": (1.25, 2.5)}
    assert (source.mask is not None) == (channel == "threshold_2")
    assert any("of the channels threshold_1, threshold_2, difference" in n for n in source.notes)


def test_channels_that_cannot_be_read(tmp_path):
    path = tmp_path / "series_1_master.h5"
    save_channels(path, counts(), default=False)
    with pytest.raises(InputError, match="threshold_1, threshold_2, difference; name one"):
        read(path, scan_shape=SCAN)
    with pytest.raises(InputError, match="with `channel`, not 'threshold_3'"):
        read(path, scan_shape=SCAN, channel="threshold_3")
    (tmp_path / "series_1_master_data_000002.h5").unlink()
    with pytest.raises(InputError, match=r"series_1_master_data_000002\.h5 is missing"):
        read(path, scan_shape=SCAN, channel="difference")


READ = """
    import sys, numpy as np
    from rsciio import arina

    found = arina.file_reader(sys.argv[1], navigation_shape=(3, 5))[0]
    np.save(sys.argv[2], found["data"])
"""


@pytest.mark.slow
def test_another_library_reads_the_same(tmp_path):
    """No library writes these files; what our example holds, RosettaSciIO finds as well.

    It reads square detectors only.
    """
    path, cube = tmp_path / "scan_master.h5", counts()[..., :4]
    save_dectris(path, cube, mask=False)
    python = python_with("rosettasciio[hdf5]==0.15.0", "hdf5plugin")
    run(python, READ, path, tmp_path / "found.npy")
    ours = read(path, scan_shape=SCAN).read().dense()
    np.testing.assert_array_equal(ours, flat(cube))
    np.testing.assert_array_equal(flat(np.load(tmp_path / "found.npy")), flat(cube))
