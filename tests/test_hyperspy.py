"""HyperSpy signals in HDF5 and in zarr: one tree, one answer."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from .foreign import python_with, run
from .scan_files import flat, FRAME, opened, SCAN
from .tree_files import counts, FACTS, save_hspy, save_zspy


SAVE = {
    "scan.hspy": save_hspy,
    "scan.zspy": save_zspy,
    "scan_3.zspy": lambda path, cube: save_zspy(path, cube, version=3),
    "scan.zspy.zip": save_zspy,
}


@pytest.mark.parametrize("name", SAVE)
def test_signals(tmp_path, name):
    SAVE[name](tmp_path / name, counts())
    source = read(tmp_path / name)
    assert source.format == ("hspy" if name == "scan.hspy" else "zspy")
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    index = np.array([7, 14, 0, 7])
    np.testing.assert_array_equal(source.read(index).dense(), flat(counts())[index])
    expected = FACTS | {"center": (2, 3), "energy_ev": 8e4, "semiangle_mrad": 25}
    assert source.facts == {key: pytest.approx(value) for key, value in expected.items()}
    assert source.notes == ()


def test_one_of_several_signals(tmp_path):
    save_hspy(tmp_path / "a.hspy", counts(), titles=("first", "second"))
    with pytest.raises(InputError, match=r"'first' \(3, 5, 4, 6\), 'second' \(3, 5, 4, 6\); name"):
        read(tmp_path / "a.hspy")
    source = read(tmp_path / "a.hspy", dataset="second")
    np.testing.assert_array_equal(source.read().dense(), flat(counts() + 1))
    with pytest.raises(InputError, match="with `dataset`, not 'third'"):
        read(tmp_path / "a.hspy", dataset="third")


def change(path, edit, **how):
    save_hspy(path, counts(), **how)
    with opened(path, "a") as file:
        edit(file["Experiments/scan"])


def lists(group):
    import h5py

    del group["data"]
    group.create_dataset("data", (3, 5), h5py.vlen_dtype(np.uint8))
    group["ragged_shapes"] = np.zeros((3, 5))


def spectra(group):
    group["axis-2"].attrs["navigate"] = True


def waves(group):
    del group["data"]
    group["data"] = counts() * 1j


def turned(group):
    for i in range(4):
        group[f"axis-{i}"].attrs["units"] = "nm^-1" if i < 2 else "nm"


def empty(group):
    del group["data"]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lists, "'scan'.*(ragged|which are not counts)"),
        (lambda group: group["attributes"].attrs.modify("ragged", True), "is ragged"),
        (spectra, "3 scan axes and 1 signal axes.*transpose"),
        (waves, "complex128, which are not counts"),
        (turned, "the detector seems to come before the scan"),
        (empty, "has the signals 'scan' None"),
    ],
)
def test_signals_that_are_no_frames(tmp_path, edit, message):
    change(tmp_path / "a.hspy", edit)
    with pytest.raises(InputError, match=f"a.hspy: .*{message}"):
        read(tmp_path / "a.hspy")


def test_settings_that_say_nothing(tmp_path):
    def edit(group):
        microscope = group["metadata/Acquisition_instrument/TEM"]
        microscope.attrs.update(beam_energy="_None_", convergence_angle=np.nan)
        group["axis-3"].attrs.update(scale=1.0, offset=0.0, units="_None_")
        group["axis-0"].attrs["_type"] = "DataAxis"

    change(tmp_path / "a.hspy", edit)
    assert read(tmp_path / "a.hspy").facts == {}


def test_a_line_of_frames(tmp_path):
    """Signals with one scan axis need the shape of the scan."""

    def edit(group):
        del group["data"], group["axis-3"]
        group["data"] = flat(counts())
        for i, navigate in enumerate((True, False, False)):
            group[f"axis-{i}"].attrs["navigate"] = navigate

    change(tmp_path / "a.hspy", edit)
    with pytest.raises(InputError, match="stack of 15 frames"):
        read(tmp_path / "a.hspy")
    source = read(tmp_path / "a.hspy", scan_shape=SCAN)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))


WRITE = """
    import sys, numpy as np
    from rsciio import hspy, zspy

    cube = np.load(sys.argv[1])
    steps = [("y", 0.05, "nm", 0), ("x", 0.07, "nm", 0), ("ky", 0.2, "nm^-1", -0.4),
             ("kx", 0.3, "nm^-1", -0.9)]
    axes = [
        dict(_type="UniformDataAxis", name=name, units=unit, navigate=i < 2, size=cube.shape[i],
             scale=step, offset=offset, is_binned=False, index_in_array=i)
        for i, (name, step, unit, offset) in enumerate(steps)
    ]
    microscope = dict(beam_energy=80.0, convergence_angle=25.0, camera_length=12.0)
    signal = dict(
        data=cube, axes=axes, original_metadata={}, learning_results={}, models={},
        metadata=dict(General=dict(title="a scan"), Signal=dict(signal_type=""),
                      Acquisition_instrument=dict(TEM=microscope)),
        attributes={"_lazy": False, "ragged": False}, tmp_parameters={},
        package_info=dict(package="hyperspy", package_version="2.3"),
    )
    (hspy if sys.argv[2].endswith(".hspy") else zspy).file_writer(sys.argv[2], signal)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.hspy", "a.zspy"])
def test_files_of_rosettasciio(tmp_path, name):
    python = python_with("rosettasciio[hdf5,zspy]==0.15.0")
    np.save(tmp_path / "cube.npy", counts())
    run(python, WRITE, tmp_path / "cube.npy", tmp_path / name)
    source = read(tmp_path / name)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    expected = FACTS | {"center": (2, 3), "energy_ev": 8e4, "semiangle_mrad": 25}
    assert source.facts == {key: pytest.approx(value) for key, value in expected.items()}
