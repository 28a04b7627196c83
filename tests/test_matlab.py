"""MATLAB arrays: whatever the order of their indices, the same frames."""

import itertools

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from .foreign import python_with, run
from .scan_files import flat, FRAME, opened, SCAN
from .tree_files import counts, save_matlab, save_matlab_5


OURS = ("ky", "kx", "y", "x")


@pytest.mark.parametrize("order", [*map(" ".join, itertools.permutations(OURS))])
def test_every_order(tmp_path, order):
    path, cube = tmp_path / "scan.mat", counts()
    save_matlab(path, cube, order)
    source = read(path, order=order)
    assert (source.format, source.dataset) == ("matlab", "dp")
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    index = np.array([6, 14, 0, 6])
    np.testing.assert_array_equal(source.read(index).dense(), flat(cube)[index])


def test_the_default_order(tmp_path):
    save_matlab(tmp_path / "scan.mat", counts())
    source = read(tmp_path / "scan.mat")
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    said = "the size (4, 6, 3, 5) in MATLAB is taken as (ky kx y x); say `order` if not"
    assert source.notes == (said,)


def test_fold_slice(tmp_path):
    """`dp` is (ky, kx, frames) in MATLAB, without a sign that MATLAB wrote it."""
    stack = np.transpose(flat(counts()), (1, 2, 0))
    save_matlab(tmp_path / "scan.mat", counts(), dp=stack)
    with pytest.raises(InputError, match=r"0 arrays.*dp \(4, 6, 15\).*`scan_shape`"):
        read(tmp_path / "scan.mat")
    source = read(tmp_path / "scan.mat", scan_shape=SCAN)
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
    turned = read(tmp_path / "scan.mat", scan_shape=SCAN, order="kx,ky,frames")
    np.testing.assert_array_equal(turned.read().dense(), flat(counts()).swapaxes(1, 2))
    with opened(tmp_path / "data_dp.hdf5", "w") as file:
        file["dp"] = stack.T
    source = read(tmp_path / "data_dp.hdf5", scan_shape=SCAN, format="matlab")
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))


def test_one_of_several_arrays(tmp_path):
    path = tmp_path / "scan.mat"
    second = np.transpose(counts(1), (2, 3, 0, 1))
    save_matlab(path, counts(), "ky kx y x", **{"run/second": second})
    with pytest.raises(InputError, match=r"2 arrays.*dp \(4, 6, 3, 5\), .*run/second \(4, 6, 3, 5"):
        read(path)
    for name in ("run/second", "run.second"):
        source = read(path, dataset=name)
        np.testing.assert_array_equal(source.read().dense(), flat(counts(1)))
    with pytest.raises(InputError, match="there is no array 'name'"):
        read(path, dataset="name")
    with pytest.raises(InputError, match=r"sizes \(6, 4\); frames need four axes"):
        read(path, dataset="probe/start")


@pytest.mark.parametrize("order", ["y x", "y x ky ky", "frames ky kx y", "abc"])
def test_orders_that_do_not_fit(tmp_path, order):
    save_matlab(tmp_path / "scan.mat", counts())
    with pytest.raises(InputError, match=f"order={order!r}.*names each of y, x, ky, kx once"):
        read(tmp_path / "scan.mat", order=order)


def test_older_files(tmp_path):
    save_matlab_5(tmp_path / "scan.mat")
    with pytest.raises(InputError, match="before version 7.3.*'-v7.3'.*scipy.io.loadmat"):
        read(tmp_path / "scan.mat")


def test_the_sign_alone(tmp_path):
    (tmp_path / "scan.mat").write_bytes(b"MATLAB 7.3 MAT-file, and nothing else")
    with pytest.raises(InputError, match="cannot be read as HDF5"):
        read(tmp_path / "scan.mat")


def test_complex_arrays(tmp_path):
    save_matlab(tmp_path / "scan.mat", counts() * 1j)
    with pytest.raises(InputError, match="which are not counts"):
        read(tmp_path / "scan.mat")


WRITE = """
    import sys, hdf5storage, numpy as np

    variables = {"dp": np.load(sys.argv[1]), "name": "abc", "parts": [1, "x"]}
    hdf5storage.savemat(sys.argv[2], variables, format="7.3")
"""


@pytest.mark.slow
def test_a_file_of_hdf5storage(tmp_path):
    """As MATLAB lays it out: the indices of the array are those of MATLAB."""
    np.save(tmp_path / "cube.npy", np.transpose(counts(), (2, 3, 0, 1)))
    run(python_with("hdf5storage==0.2.2"), WRITE, tmp_path / "cube.npy", tmp_path / "a.mat")
    source = read(tmp_path / "a.mat")
    assert source.format == "matlab"
    np.testing.assert_array_equal(source.read().dense(), flat(counts()))
