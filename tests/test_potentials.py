"""Scattering factors and projected potentials against closed forms, SciPy and abTEM's slices."""

import h5py
import numpy as np
import pytest
from scipy import integrate, special

from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.potentials import (
    atom_potential,
    lobato,
    POTENTIAL_UNIT,
    projected_potential,
    scattering_factor,
)

from .helpers import shared_data


def read_truth(path):
    """Every array of a truth file, and its pixel in Å."""
    with h5py.File(path) as file:
        arrays = {k: np.asarray(v[()]) for k, v in file.items() if isinstance(v, h5py.Dataset)}
        return arrays, float(np.asarray(file.attrs["pixel_A"]))


def with_scipy(number, radius):
    """The closed form with SciPy's Bessel functions."""
    a, b = lobato(number)
    slope, height = 2 * np.pi / np.sqrt(b), POTENTIAL_UNIT * np.pi**2 * a / b**1.5
    r = np.asarray(radius)[..., None]
    terms = 2 * height / slope * special.k0(slope * r) + height * r * special.k1(slope * r)
    return 2 * terms.sum(axis=-1)


def test_unit_follows_from_the_constants():
    planck, mass, charge = 6.62607015e-34, 9.1093837139e-31, 1.602176634e-19
    unit = planck**2 / (2 * np.pi * mass * charge) * 1e20
    assert pytest.approx(unit, rel=1e-8) == POTENTIAL_UNIT


@pytest.mark.parametrize("radius, volts", [(0.1, 413.6265), (0.5, 76.30075), (1.0, 19.7637)])
def test_silicon_has_its_known_potential(radius, volts):
    assert float(atom_potential(14, np.array(radius))) == pytest.approx(volts, rel=1e-6)


def test_silicon_scatters_as_known():
    assert float(scattering_factor(14, np.array(0.0))) == pytest.approx(5.836, rel=1e-6)


@pytest.mark.parametrize("number", [1, 2, 6, 14, 79, 92, 103])
def test_closed_form_agrees_with_scipy(number):
    radius = np.array([[1e-3, 0.02, 0.3], [1.1, 3.0, 6.0]])
    mine = atom_potential(number, radius)
    assert mine.shape == (2, 3)
    # Hydrogen's terms cancel, so rounding is measured on the sum of their sizes.
    np.testing.assert_allclose(mine, with_scipy(number, radius), rtol=1e-9, atol=1e-9)


def test_every_element_is_there_and_scatters():
    frequency = np.linspace(0, 6, 61)
    for number in range(1, 104):
        factor = scattering_factor(number, frequency)
        assert np.all(factor > 0), number
        assert np.all(np.diff(factor) < 0), number
        assert 0.1 < factor[0] < 40, number


@pytest.mark.parametrize("number", [1, 6, 29, 79, 103])
def test_high_angles_see_the_bare_nucleus(number):
    """Mott and Bethe: g² f_e tends to Z/(2 pi² a0) where the electrons no longer screen."""
    bohr = 0.529177210903
    assert 100.0**2 * float(scattering_factor(number, np.array(100.0))) == pytest.approx(
        number / (2 * np.pi**2 * bohr), rel=0.02
    )


@pytest.mark.parametrize("number", [0, -3, 104])
def test_an_element_outside_the_table_is_refused(number):
    with pytest.raises(ValueError, match=f"{number}.*103"):
        lobato(number)


@pytest.mark.parametrize("number, frequency", [(14, 0.3), (14, 1.5), (79, 0.8)])
def test_closed_form_is_the_transform_of_the_scattering_factor(number, frequency):
    integrand = lambda r: (
        2 * np.pi * r * special.j0(2 * np.pi * frequency * r) * with_scipy(number, r)
    )
    pieces = np.concatenate([[0.0], np.arange(0.05, 15, 0.5 / frequency)])
    total = sum(
        integrate.quad(integrand, a, b, epsabs=1e-9)[0]
        for a, b in zip(pieces[:-1], pieces[1:], strict=True)
    )
    expected = POTENTIAL_UNIT * float(scattering_factor(number, np.array(frequency)))
    assert total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("number", [6, 14, 79])
@pytest.mark.parametrize("shape", [(160, 150), (135, 144)])
def test_slices_hold_the_closed_form(number, shape):
    """Over smooth rings around an atom between pixels, where the grid's band limit averages out."""
    extent = np.array([16.0, 15.0])
    grid = Grid(shape, (16.0 / shape[0], 15.0 / shape[1]))
    centre = np.array([8.0123, 7.0071])
    atom = np.array([[*centre, 0.5]])
    slices = projected_potential(np.array([number]), atom, grid, np.array([0.0, 1.0]))
    y, x = grid.coordinates()
    distance = lambda i, j: np.hypot(y - centre[0] - i * extent[0], x - centre[1] - j * extent[1])
    images = sum(with_scipy(number, distance(i, j)) for i in (-1, 0, 1) for j in (-1, 0, 1))
    for radius in (1.2, 1.6, 2.2):
        ring = np.exp(-((distance(0, 0) - radius) ** 2) / (2 * 0.2**2))
        assert np.sum(ring * slices[0]) == pytest.approx(np.sum(ring * images), rel=1e-4)


def test_a_whole_pixel_of_shift_rolls_the_image():
    grid = Grid((24, 30), (0.2, 0.25))
    at = np.array([[1.03, 2.2, 0.0], [0.4, 6.9, 0.0]])
    edges = np.array([-1.0, 1.0])
    here = projected_potential(np.array([6, 79]), at, grid, edges)
    there = projected_potential(
        np.array([6, 79]), at + np.array([3 * 0.2, -7 * 0.25, 0.0]), grid, edges
    )
    np.testing.assert_allclose(there, np.roll(here, (3, -7), (1, 2)), atol=1e-9 * here.max())


@pytest.mark.parametrize("shape", [(24, 30), (25, 30), (24, 31), (25, 31)])
def test_sum_over_frequencies_by_hand(shape):
    """A direct Fourier sum, even and odd numbers of pixels, sub-pixel positions."""
    grid = Grid(shape, (0.2, 0.25))
    at = np.array([[1.033, 2.21, 0.2], [3.4, 5.987, 0.1]])
    slices = projected_potential(np.array([14, 14]), at, grid, np.array([0.0, 1.0]))
    ky, kx = grid.frequencies()
    factor = POTENTIAL_UNIT * scattering_factor(14, np.hypot(ky, kx))
    y, x = grid.coordinates()
    for row, column in [(0, 0), (5, 11), (20, 2)]:
        value = 0.0
        for py, px, _ in at:
            waves = []
            for k, step, pixel, atom in ((ky, 0.2, y[row], py), (kx, 0.25, x[0, column], px)):
                # At the Nyquist frequency the atom's own phase is a cosine.
                mean = np.cos(2 * np.pi * k * pixel) * np.cos(2 * np.pi * k * atom)
                nyquist = np.isclose(np.abs(k), 0.5 / step)
                waves.append(np.where(nyquist, mean, np.exp(2j * np.pi * k * (pixel - atom))))
            value += np.sum(factor * waves[0] * waves[1]).real
        expected = value / (grid.extent[0] * grid.extent[1])
        assert slices[0, row, column] == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_atoms_go_whole_into_their_slice():
    grid = Grid((20, 24), (0.3, 0.3))
    at = np.array([[1.0, 1.0, 0.0], [2.0, 4.0, 1.999], [3.0, 2.0, 2.0], [1.0, 2.0, 7.0]])
    numbers = np.array([6, 8, 14, 79])
    slices = projected_potential(numbers, at, grid, np.array([0.0, 2.0, 4.0, 6.0, 8.0]))
    forward = [POTENTIAL_UNIT * float(scattering_factor(n, np.array(0.0))) for n in (6, 8, 14, 79)]
    mean = slices.sum(axis=(1, 2)) * grid.pixel_area
    np.testing.assert_allclose(mean, [forward[0] + forward[1], forward[2], 0, forward[3]])


@pytest.mark.parametrize(
    "edges, message",
    [
        ([0.0], "increase"),
        ([0.0, 2.0, 2.0], "increase"),
        ([0.0, 0.4], "z = 0.5"),
        ([1.0, 2.0], "z"),
    ],
)
def test_bad_edges_are_refused(edges, message):
    atom = np.array([[1.0, 1.0, 0.5]])
    with pytest.raises(ValueError, match=message):
        projected_potential(np.array([6]), atom, Grid((8, 9), (0.3, 0.3)), np.array(edges))


@pytest.mark.parametrize("case, tolerance", [("nanotubes_series", 0.005), ("heavy_series", 0.007)])
def test_abtem_slices_are_reproduced(case, tolerance):
    """abTEM puts each atom onto four pixels; done to ours, the slices agree."""
    truth, sampling = read_truth(shared_data(case, "truth.h5"))
    theirs, atoms, numbers = (truth[k] for k in ("slices_V_A", "atoms_xyz_A", "numbers"))
    edges = np.append(0.0, truth["slice_z_A"])
    grid = Grid(theirs.shape[1:], (sampling, sampling))
    ours = np.fft.fft2(projected_potential(numbers, atoms, grid, edges))
    theirs = np.fft.fft2(theirs)
    frequency = np.hypot(*grid.frequencies())
    low = frequency < 0.3
    close = np.linalg.norm((ours - theirs)[:, low]) / np.linalg.norm(theirs[:, low])
    assert close < 0.005
    layer = np.searchsorted(edges, atoms[:, 2], side="right") - 1
    spread = np.zeros(theirs.shape, complex)
    for number in np.unique(numbers):
        bilinear = np.zeros(theirs.shape)
        chosen = numbers == number
        whole = np.floor(atoms[chosen, :2] / sampling).astype(int)
        rest = atoms[chosen, :2] / sampling - whole
        for down in (0, 1):
            for right in (0, 1):
                weight = np.abs(1 - down - rest[:, 0]) * np.abs(1 - right - rest[:, 1])
                rows, columns = (whole + [down, right]).T % grid.shape[0]
                np.add.at(bilinear, (layer[chosen], rows, columns), weight)
        factor = POTENTIAL_UNIT * scattering_factor(int(number), frequency) / grid.pixel_area
        spread += np.fft.fft2(bilinear) * factor
    assert np.linalg.norm(spread - theirs) / np.linalg.norm(theirs) < tolerance
