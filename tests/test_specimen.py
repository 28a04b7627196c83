"""Atoms to slices: axes, sampling, empty space, and what is refused."""

import ase
import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.potentials import POTENTIAL_UNIT, scattering_factor
from smpr3d_jax.physics.specimen import Slices, slices_from_atoms


def two_atoms():
    """Si at x = 2, y = 5 and Au at x = 7, y = 1 (Å), far apart along the beam."""
    return ase.Atoms("SiAu", [[2.0, 5.0, 3.3], [7.0, 1.0, 58.0]], cell=[9.0, 6.0, 60.0])


def test_ase_x_is_the_last_axis():
    slices = slices_from_atoms(two_atoms(), 0.25, 2.0)
    assert slices.grid == Grid((24, 36), (0.25, 0.25))
    assert slices.potential.dtype == jnp.float32
    for image, (y, x) in zip(slices.potential, [(5.0, 2.0), (1.0, 7.0)], strict=True):
        row, column = np.unravel_index(int(jnp.argmax(image)), image.shape)
        assert (row * 0.25, column * 0.25) == (y, x)


def test_empty_slices_are_left_out_and_depths_are_the_atoms():
    slices = slices_from_atoms(two_atoms(), 0.25, 2.0)
    assert slices.depths == pytest.approx((3.3, 58.0))
    atoms = two_atoms()
    atoms.positions[:, 2] = [-1.0, -1.8]
    assert slices_from_atoms(atoms, 0.25, 2.0).depths == pytest.approx((-1.4,))


def test_depth_of_a_slice_is_the_mean_of_its_atoms():
    atoms = ase.build.bulk("Si", cubic=True) * (1, 1, 3)
    slices = slices_from_atoms(atoms, 0.2, 2.0)
    index = np.floor(atoms.positions[:, 2] / 2.0)
    expected = [atoms.positions[index == i, 2].mean() for i in np.unique(index)]
    assert slices.depths == pytest.approx(expected)
    mean = np.asarray(slices.potential, float).sum() * slices.grid.pixel_area
    forward = len(atoms) * POTENTIAL_UNIT * float(scattering_factor(14, np.array(0.0)))
    assert mean == pytest.approx(forward, rel=1e-5)


def test_atoms_outside_the_cell_are_wrapped():
    atoms = two_atoms()
    moved = atoms.copy()
    moved.positions += [9.0, -12.0, 0.0]
    np.testing.assert_allclose(
        slices_from_atoms(moved, 0.3, 2.0).potential,
        slices_from_atoms(atoms, 0.3, 2.0).potential,
        atol=1e-2,
    )


@pytest.mark.parametrize(
    "sampling, divisor, shape",
    [(0.25, 1, (24, 36)), (0.21, 1, (30, 45)), ((0.3, 0.21), 2, (20, 48)), (0.25, 7, (28, 42))],
)
def test_pixels_fill_the_cell_and_transform_fast(sampling, divisor, shape):
    slices = slices_from_atoms(two_atoms(), sampling, 2.0, divisor)
    assert slices.grid.shape == shape
    assert slices.grid.extent == pytest.approx((6.0, 9.0))
    assert np.all(np.asarray(slices.grid.sampling) <= np.asarray(sampling) + 1e-9)


def test_double_precision_when_asked(x64):
    assert slices_from_atoms(two_atoms(), 0.25, 2.0, dtype=np.float64).potential.dtype == np.float64


def test_a_slanted_cell_is_refused():
    with pytest.raises(ValueError, match="orthogonal"):
        slices_from_atoms(ase.build.bulk("Si"), 0.25, 2.0)


@pytest.mark.parametrize(
    "atoms, sampling, thickness, message",
    [
        (ase.Atoms(cell=[5, 5, 5]), 0.2, 2.0, "empty"),
        (ase.Atoms("C", [[0, 0, 0]]), 0.2, 2.0, "positive lengths"),
        (ase.Atoms("C", [[0, 0, 0]], cell=[5, 5, 0]), 0.2, 0.0, "slice_thickness"),
        (ase.Atoms("C", [[0, 0, 0]], cell=[5, 5, 0]), -0.2, 2.0, "sampling"),
        (ase.Atoms("X", [[0, 0, 0]], cell=[5, 5, 0]), 0.2, 2.0, "atomic number 0"),
    ],
)
def test_bad_structures_are_refused(atoms, sampling, thickness, message):
    with pytest.raises(ValueError, match=message):
        slices_from_atoms(atoms, sampling, thickness)


@pytest.mark.parametrize("depths", [(0.0,), (1.0, 1.0), (2.0, 1.0), ()])
def test_slices_check_their_depths(depths):
    with pytest.raises(ValueError, match="depths"):
        Slices(jnp.zeros((2 if depths else 0, 4, 5)), depths, Grid((4, 5), (0.2, 0.2)))


def test_only_the_potential_is_a_leaf():
    slices = slices_from_atoms(two_atoms(), 0.25, 2.0)
    (leaf,) = jax.tree.leaves(slices)
    assert leaf is slices.potential
    doubled = jax.tree.map(lambda v: 2 * v, slices)
    assert doubled.depths == slices.depths
