"""EMD 0.2 and the files of py4DSTEM before 0.14: where the data are, and what they say."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from .foreign import python_with, run
from .scan_files import flat, FRAME, opened, SCAN
from .tree_files import counts, FACTS, save_berkeley, save_py4dstem_12, save_py4dstem_13


PIXELS = {
    "R_pixel_size": 0.5,
    "R_pixel_size_units": "nm",
    "Q_pixel_size": 0.02,
    "Q_pixel_size_units": "A^-1",
}
OLD = {"R_pix_size": 0.5, "R_pix_units": "nm", "K_pix_size": 0.02, "K_pix_units": "1/A"}
SAMPLING = {"scan_step_A": (5, 5), "detector_pixel_inv_A": (0.02, 0.02)}
OPTICS = {"energy_ev": 8e4, "semiangle_mrad": 25}
SAVE = {
    "berkeley": (save_berkeley, FACTS),
    "12": (lambda p, c: save_py4dstem_12(p, c, **PIXELS), SAMPLING | OPTICS),
    "5": (lambda p, c: save_py4dstem_12(p, c, "datacube", **OLD), SAMPLING | OPTICS),
    "13": (
        lambda p, c: save_py4dstem_13(p, c, Q_pixel_size=1.5, Q_pixel_units="mrad"),
        {"detector_pixel_mrad": (1.5, 1.5)},
    ),
}


@pytest.mark.parametrize("name", SAVE)
def test_layouts_and_facts(tmp_path, name):
    save, facts = SAVE[name]
    save(tmp_path / "a.h5", counts())
    source = read(tmp_path / "a.h5")
    assert source.format == "emd_legacy"
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    assert source.facts == {key: pytest.approx(value) for key, value in facts.items()}
    assert source.notes == ()


@pytest.mark.parametrize("order", ["kx ky x y", "ky kx y x", "x y kx ky"])
def test_axes_in_another_order(tmp_path, order):
    cube = np.transpose(counts(), [("y", "x", "ky", "kx").index(name) for name in order.split()])
    save_berkeley(tmp_path / "a.emd", cube, order)
    source = read(tmp_path / "a.emd", order=order)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    assert source.facts == {key: pytest.approx(value) for key, value in FACTS.items()}
    if order.startswith("k"):
        with pytest.raises(InputError, match="name its axes with `order`"):
            read(tmp_path / "a.emd")
    with pytest.raises(InputError, match="order='y x' was given; it names each of y, x, ky, kx"):
        read(tmp_path / "a.emd", order="y x")


def test_what_is_not_relied_on(tmp_path):
    save_py4dstem_12(tmp_path / "12.h5", counts(), QR_rotation_degrees=30.0, QR_flip=True)
    assert read(tmp_path / "12.h5").facts == OPTICS
    save_py4dstem_13(
        tmp_path / "13.h5", counts(), convergence_semiangle_mrad=7.5, QR_rotation_degrees=30.0
    )
    assert read(tmp_path / "13.h5").facts == {"rotation_deg": 30, "transpose": False}


def test_one_of_several_datacubes(tmp_path):
    path = tmp_path / "a.h5"
    save_py4dstem_12(path, counts())
    with opened(path, "a") as file:
        group = file.create_group("4DSTEM_experiment/data/datacubes/second")
        group.attrs["emd_group_type"] = 1
        group["data"] = counts(1)
    with pytest.raises(InputError, match="2 datacubes: .*/datacubes/my scan, .*/datacubes/second"):
        read(path)
    for name in ("second", "/4DSTEM_experiment/data/datacubes/second/data"):
        source = read(path, dataset=name)
        np.testing.assert_array_equal(source.read().dense(), flat(counts(1)))
    with pytest.raises(InputError, match="has no 'third'"):
        read(path, dataset="third")


def test_a_stack(tmp_path):
    path = tmp_path / "a.emd"
    save_berkeley(path, counts())
    with opened(path, "a") as file:
        group = file["data/scan"]
        del group["data"], group["dim1"]
        group["data"] = flat(counts())
        for i in (2, 3, 4):
            group.move(f"dim{i}", f"dim{i - 1}")
    with pytest.raises(InputError, match=r"no 4D datacube.*/data/scan/data \(15, 4, 6\)"):
        read(path)
    source = read(path, scan_shape=SCAN)
    assert source.facts == {"detector_pixel_inv_A": pytest.approx((0.02, 0.03))}
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))


WITH_12 = """
    import sys, numpy as np, py4DSTEM
    from py4DSTEM.io.datastructure import DataCube, Metadata

    cube = DataCube(data=np.load(sys.argv[1]), name="my scan")
    cube.metadata = known = Metadata()
    known.set_R_pixel_size(0.5)
    known.set_R_pixel_size_units("nm")
    known.set_Q_pixel_size(0.02)
    known.set_Q_pixel_size_units("A^-1")
    known.set_beam_energy(8e4)
    known.set_convergence_semiangle_mrad(25.0)
    py4DSTEM.io.save(sys.argv[2], cube)
"""
WITH_13 = """
    import sys, numpy as np, py4DSTEM

    cube = py4DSTEM.io.DataCube(data=np.load(sys.argv[1]), name="my_scan")
    known = cube.calibration
    known.set_R_pixel_size(0.5)
    known.set_R_pixel_units("nm")
    known.set_Q_pixel_size(0.02)
    known.set_Q_pixel_units("A^-1")
    known.set_convergence_semiangle_pixels(2.0)
    py4DSTEM.save(sys.argv[2], cube)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "version, script, facts",
    [("0.12.24", WITH_12, SAMPLING | OPTICS), ("0.13.17", WITH_13, SAMPLING)],
)
def test_files_of_py4dstem(tmp_path, version, script, facts):
    python = python_with(f"py4DSTEM=={version}", "numpy<2", "ncempy<=1.11.2")
    np.save(tmp_path / "cube.npy", counts())
    run(python, script, tmp_path / "cube.npy", tmp_path / "a.h5")
    source = read(tmp_path / "a.h5")
    assert source.format == "emd_legacy"
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    assert source.facts == {key: pytest.approx(value) for key, value in facts.items()}


WITH_RSCIIO = """
    import sys, numpy as np
    from rsciio import emd

    cube = np.load(sys.argv[1])
    steps = [("y", 0.05, "nm"), ("x", 0.07, "nm"), ("ky", 0.2, "1/nm"), ("kx", 0.3, "1/nm")]
    axes = [
        dict(name=name, units=unit, navigate=i < 2, size=cube.shape[i], scale=step, offset=0.0,
             _type="UniformDataAxis", is_binned=False, index_in_array=i)
        for i, (name, step, unit) in enumerate(steps)
    ]
    emd.file_writer(sys.argv[2], dict(
        data=cube, axes=axes, original_metadata={},
        metadata=dict(General=dict(title="scan"), Signal=dict(signal_type="")),
        attributes=dict(_lazy=False),
    ))
"""


@pytest.mark.slow
def test_an_emd_of_rosettasciio(tmp_path):
    python = python_with("rosettasciio[hdf5,zspy]==0.15.0")
    np.save(tmp_path / "cube.npy", counts())
    run(python, WITH_RSCIIO, tmp_path / "cube.npy", tmp_path / "a.emd")
    with pytest.raises(InputError, match="the detector seems to come before the scan; .*`order`"):
        read(tmp_path / "a.emd")
    source = read(tmp_path / "a.emd", order="kx ky x y")
    assert source.format == "emd_legacy"
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    assert source.facts == {key: pytest.approx(value) for key, value in FACTS.items()}
