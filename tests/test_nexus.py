"""NXdata: which group, which dataset, and what its axes say."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from .foreign import python_with, run
from .scan_files import flat, FRAME, opened, SCAN
from .tree_files import AXES, counts, FACTS, save_nexus


@pytest.mark.parametrize("old", [False, True])
def test_signal_and_axes(tmp_path, old):
    save_nexus(tmp_path / "scan.nxs", counts(), old)
    source = read(tmp_path / "scan.nxs")
    assert (source.format, source.dataset) == ("nexus", "/entry/scan/counts")
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    index = np.array([7, 14, 0, 7])
    np.testing.assert_array_equal(source.read(index).dense(), flat(counts())[index])
    assert source.facts["energy_ev"] == 6e4
    for fact, value in (FACTS | {"center": (2, 3)}).items():
        np.testing.assert_allclose(source.facts[fact], value)


def another(path, name="other", seed=1):
    with opened(path, "a") as file:
        group = file.create_group(f"entry/{name}")
        group.attrs.update(NX_class="NXdata", signal="counts")
        group["counts"] = counts(seed)


def test_one_of_several_groups(tmp_path):
    path = tmp_path / "scan.nxs"
    save_nexus(path, counts())
    another(path)
    np.testing.assert_array_equal(read(path).read().dense(), flat(counts()))
    source = read(path, dataset="other")
    np.testing.assert_array_equal(source.read().dense(), flat(counts(1)))
    assert source.facts == {"energy_ev": 6e4}
    with opened(path, "a") as file:
        del file.attrs["default"]
    with pytest.raises(InputError, match="2 NXdata groups with frames: /entry/other, /entry/scan"):
        read(path)
    with pytest.raises(InputError, match="no NXdata group 'third'"):
        read(path, dataset="third")


def test_a_default_that_leads_in_a_circle(tmp_path):
    path = tmp_path / "scan.nxs"
    save_nexus(path, counts())
    with opened(path, "a") as file:
        file["entry/entry"] = file["entry"]
        file["entry"].attrs["default"] = "entry"
    np.testing.assert_array_equal(read(path).read().dense(), flat(counts()))


def test_a_stack(tmp_path):
    path = tmp_path / "scan.nxs"
    with opened(path, "w") as file:
        group = file.create_group("data")
        group.attrs.update(NX_class="NXdata", signal="data", axes=[".", "ky", "kx"])
        group["data"] = flat(counts())
        for name, n in (("ky", 4), ("kx", 6)):
            group[name] = np.arange(n) * 1.5e-3
            group[name].attrs["units"] = "rad"
    with pytest.raises(InputError, match="scan_shape"):
        read(path)
    source = read(path, scan_shape=SCAN)
    assert source.facts == {"detector_pixel_mrad": pytest.approx((1.5, 1.5))}
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))


def test_axes_by_their_indices(tmp_path):
    """The attribute `*_indices` says which axis a dataset belongs to."""
    path = tmp_path / "scan.nxs"
    save_nexus(path, counts())
    with opened(path, "a") as file:
        data = file["entry/scan"]
        data.attrs["axes"] = [".", ".", "kx", "ky"]
        data.attrs.update(ky_indices=2, kx_indices=3)
    assert read(path).facts.keys() == {"detector_pixel_inv_A", "center", "energy_ev"}
    np.testing.assert_allclose(read(path).facts["detector_pixel_inv_A"], (0.02, 0.03))


@pytest.mark.parametrize(
    "name, values, missing",
    [
        ("y", [0.0, 0.1, 0.4], "scan_step_A"),
        ("x", np.arange(9.0), "scan_step_A"),
        ("kx", np.full(6, np.nan), "detector_pixel_inv_A"),
        ("kx", -np.arange(6.0), "detector_pixel_inv_A"),
    ],
)
def test_axes_that_say_nothing(tmp_path, name, values, missing):
    path = tmp_path / "scan.nxs"
    save_nexus(path, counts())
    with opened(path, "a") as file:
        del file[f"entry/scan/{name}"]
        file[f"entry/scan/{name}"] = values
        file[f"entry/scan/{name}"].attrs["units"] = "nm" if name in "xy" else "1/nm"
    assert missing not in read(path).facts


def test_the_detector_before_the_scan(tmp_path):
    path = tmp_path / "scan.nxs"
    save_nexus(path, counts())
    with opened(path, "a") as file:
        file["entry/scan"].attrs["axes"] = [AXES[i][0] for i in (2, 3, 0, 1)]
    with pytest.raises(InputError, match="the detector seems to come before the scan"):
        read(path)
    source = read(path, order="ky kx y x")
    expected = np.transpose(counts(), (2, 3, 0, 1))
    np.testing.assert_array_equal(source.read().dense(), flat(expected))
    assert source.scan_shape == FRAME


def test_without_frames(tmp_path):
    with opened(tmp_path / "a.nxs", "w") as file:
        group = file.create_group("entry")
        group.attrs.update(NX_class="NXdata", signal="data")
        group["data"] = np.zeros((4, 5))
    with pytest.raises(InputError, match=r"no 4D dataset.*/entry/data \(4, 5\)"):
        read(tmp_path / "a.nxs")
    with pytest.raises(InputError, match=r"no NXdata with a 4D signal.*/entry/data \(4, 5\)"):
        read(tmp_path / "a.nxs", format="nexus")


WRITE = """
    import sys, numpy as np
    from rsciio import nexus

    cube = np.load(sys.argv[1])
    steps = [("y", 0.05, "nm"), ("x", 0.07, "nm"), ("ky", 0.2, "1/nm"), ("kx", 0.3, "1/nm")]
    axes = [
        dict(name=name, units=unit, navigate=i < 2, size=cube.shape[i], scale=step, offset=0.0,
             _type="UniformDataAxis", is_binned=False, index_in_array=i)
        for i, (name, step, unit) in enumerate(steps)
    ]
    nexus.file_writer(sys.argv[2], [dict(
        data=cube, axes=axes, original_metadata={}, learning_results={},
        metadata=dict(General=dict(title="scan"), Signal=dict(signal_type="")),
        attributes=dict(_lazy=False),
    )])
"""


@pytest.mark.slow
def test_a_file_of_rosettasciio(tmp_path):
    python = python_with("rosettasciio[hdf5,zspy]==0.15.0")
    np.save(tmp_path / "cube.npy", counts())
    run(python, WRITE, tmp_path / "cube.npy", tmp_path / "a.nxs")
    source = read(tmp_path / "a.nxs")
    assert source.format == "nexus"
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    assert source.facts == {key: pytest.approx(value) for key, value in FACTS.items()}
