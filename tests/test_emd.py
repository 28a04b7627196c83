"""EMD datacubes: the layout, and what the calibration says in our units."""

import h5py
import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import (
    read,
    write_emd,
)

from .foreign import python_with, run
from .scan_files import flat, opened, SCAN, some_cube


def test_emd_facts_and_layout(tmp_path):
    path = tmp_path / "cube.h5"
    write_emd(path, some_cube(), 0.5, 1.5, energy=8e4)
    assert read(path).facts == {
        "scan_step_A": (0.5, 0.5),
        "detector_pixel_mrad": (1.5, 1.5),
        "energy_ev": 8e4,
    }
    with opened(path) as file:
        assert file.attrs["emd_group_type"] == "file"
        assert file["datacube_root/datacube"].attrs["python_class"] == "DataCube"
        assert file["datacube_root/datacube/dim1"][()].tolist() == [0.0, 0.5]
    write_emd(path, some_cube(1), (0.5, 0.25), 1.5)
    assert read(path).facts["scan_step_A"] == (0.5, 0.25)
    assert [p.name for p in tmp_path.iterdir()] == ["cube.h5"]


def test_a_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cube.h5"
    write_emd(path, some_cube(), 0.5, 1.5)
    monkeypatch.setattr(h5py.File, "create_group", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_emd(path, some_cube(1), 0.5, 1.5)
    assert [p.name for p in tmp_path.iterdir()] == ["cube.h5"]
    np.testing.assert_array_equal(read(path).read().dense(), flat(some_cube()))


def calibrated(path, dims=None, **known):
    """An EMD file with the given calibration, and other axes if there are any."""
    write_emd(path, some_cube(), 0.5, 1.5)
    with opened(path, "a") as file:
        group = file["datacube_root/metadatabundle/calibration"]
        for key in list(group):
            del group[key]
        for key, value in known.items():
            group[key] = value
        for name, (values, units) in (dims or {}).items():
            del file[f"datacube_root/datacube/{name}"]
            file[f"datacube_root/datacube/{name}"] = values
            file[f"datacube_root/datacube/{name}"].attrs["units"] = units
    return path


AXES = {"scan_step_A": (0.5, 0.5), "detector_pixel_mrad": (1.5, 1.5)}
PIXELS = {
    "R_pixel_size": 1,
    "R_pixel_units": "pixels",
    "Q_pixel_size": 1,
    "Q_pixel_units": "pixels",
}


@pytest.mark.parametrize(
    "known, facts",
    [
        ({}, AXES),
        (PIXELS, AXES),
        ({"R_pixel_size": 0.2, "R_pixel_units": b"nm"}, {**AXES, "scan_step_A": (2.0, 2.0)}),
        (
            {"Q_pixel_size": 0.02, "Q_pixel_units": "A^-1"},
            {"scan_step_A": (0.5, 0.5), "detector_pixel_inv_A": (0.02, 0.02)},
        ),
        ({"Q_pixel_size": np.nan, "Q_pixel_units": "mrad"}, AXES),
        ({"QR_flip": False}, AXES),
        ({"QR_rotation": np.pi / 6}, {**AXES, "rotation_deg": 30.0, "transpose": False}),
        (
            {"QR_rotation_degrees": 30.0, "QR_flip": True},
            {**AXES, "rotation_deg": -30.0, "transpose": True},
        ),
        ({"qx0_mean": 2.25, "qy0_mean": 3.5}, {**AXES, "center": (2.25, 3.5)}),
        (
            {"qx0": np.full(SCAN, 2.0), "qy0": np.linspace(2, 4, 15).reshape(SCAN)},
            {**AXES, "center": (2.0, 3.0)},
        ),
        ({"qx0": "_None", "qy0": "_None"}, AXES),
        ({"probe_semiangle": 2.5}, {**AXES, "semiangle_pixels": 2.5}),
        ({"convergence_semiangle_mrad": 25.0}, {**AXES, "semiangle_mrad": 25.0}),
    ],
)
def test_emd_calibration(tmp_path, known, facts):
    found = read(calibrated(tmp_path / "c.h5", **known)).facts
    assert found.keys() == facts.keys()
    for key, value in facts.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-12)


def test_emd_rotation_is_ours(tmp_path):
    """The format turns detector vectors into the scan's frame: our positions turn them back."""
    from smpr3d_jax.physics.scan import raster

    angle = 0.3
    cos, sin = np.cos(angle), np.sin(angle)
    for flip in (False, True):
        path = calibrated(tmp_path / "c.h5", QR_rotation=angle, QR_flip=flip)
        facts = read(path).facts
        step = raster(SCAN, (1.0, 1.0), np.radians(facts["rotation_deg"]), facts["transpose"])
        exchanged = step[:, ::-1] if flip else step
        back = exchanged @ np.array([[cos, sin], [-sin, cos]])
        np.testing.assert_allclose(back, raster(SCAN, (1.0, 1.0)), atol=1e-12)


def test_emd_axes(tmp_path):
    """A full axis, one that starts in other units, and one that contradicts the calibration."""
    dims = {
        "dim0": (np.arange(3) * 0.5, "A"),
        "dim2": (np.array([-4.0, -3.98]), "A^-1"),
        "dim3": (np.array([-4.0, -3.98]), "A^-1"),
    }
    path = calibrated(tmp_path / "c.h5", dims, R_pixel_size=0.7, R_pixel_units="A")
    source = read(path)
    assert source.facts["scan_step_A"] == (0.7, 0.7)
    np.testing.assert_allclose(source.facts["detector_pixel_inv_A"], 0.02)
    assert source.notes == (
        "scan_step_A is 0.7 in the calibration, which is used, but 0.5 along an axis",
    )


def test_emd_without_a_datacube(tmp_path):
    path = tmp_path / "c.h5"
    write_emd(path, some_cube(), 0.5, 1.5)
    with opened(path, "a") as file:
        file.copy("datacube_root/datacube", "datacube_root/other")
    with pytest.raises(InputError, match="2 datacubes: /datacube_root/datacube, /datacube_root/o"):
        read(path)
    assert read(path, dataset="other").dataset == "/datacube_root/other/data"
    with opened(path, "a") as file:
        del file["datacube_root/datacube"]
        del file["datacube_root/other/data"]
    with pytest.raises(InputError, match=r"c\.h5: has no 4D datacube .*other/dim0 \(2,\) float64"):
        read(path)


WITH_PY4DSTEM = """
    import sys, numpy as np, py4DSTEM

    cube = py4DSTEM.DataCube(data=np.load(sys.argv[1]))
    known = cube.calibration
    known.set_R_pixel_size(0.5)
    known.set_R_pixel_units("nm")
    known.set_Q_pixel_size(0.02)
    known.set_Q_pixel_units("A^-1")
    known.set_QR_rotation_degrees(30.0)
    known.set_QR_flip(True)
    known.set_origin((1.5, 2.5))
    py4DSTEM.save(sys.argv[2], cube, mode="o")
"""
WITH_EMDFILE = """
    import sys, numpy as np, emdfile

    array = emdfile.Array(
        data=np.load(sys.argv[1]), name="scan", dims=[0.5, 0.7, 0.02, 0.03],
        dim_names=["y", "x", "ky", "kx"], dim_units=["nm", "nm", "A^-1", "A^-1"],
    )
    emdfile.save(sys.argv[2], array)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "packages, script, facts",
    [
        (
            ("py4DSTEM==0.14.18", "numpy<2"),
            WITH_PY4DSTEM,
            {
                "scan_step_A": (5, 5),
                "detector_pixel_inv_A": (0.02, 0.02),
                "rotation_deg": -30,
                "transpose": True,
                "center": (1.5, 2.5),
            },
        ),
        (
            ("emdfile==0.0.16",),
            WITH_EMDFILE,
            {"scan_step_A": (5, 7), "detector_pixel_inv_A": (0.02, 0.03)},
        ),
    ],
)
def test_files_of_the_libraries(tmp_path, packages, script, facts):
    np.save(tmp_path / "cube.npy", some_cube())
    run(python_with(*packages), script, tmp_path / "cube.npy", tmp_path / "a.h5")
    source = read(tmp_path / "a.h5")
    assert source.format == "emd"
    np.testing.assert_array_equal(source.read().dense(), flat(some_cube()))
    assert source.facts == {key: pytest.approx(value) for key, value in facts.items()}
