"""The specimen as slices: the potential on a few planes, and empty space between them.

`potential` is projected, real, in V Å, one plane for each of `depths` (Å, increasing, z along the
beam); pixel (0, 0) lies at `origin` (y, x) in Å. Empty slices are not kept: a wave crosses free
space of any thickness in one step.
"""

import math

import ase
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .grid import Grid
from .potentials import projected_potential


class Slices(eqx.Module):
    """Projected potential (V Å) on the planes z = `depths` (Å) of a plane `grid` of pixels."""

    potential: Float[Array, "slices y x"]
    depths: tuple[float, ...] = eqx.field(static=True)
    grid: Grid
    origin: tuple[float, float] = eqx.field(static=True, default=(0.0, 0.0))

    def __check_init__(self):
        shape = (len(self.depths), *self.grid.shape)
        if self.potential.shape != shape:
            raise ValueError(
                f"`Slices.potential` has shape {self.potential.shape}, but {len(self.depths)} "
                f"depths on a grid of {self.grid.shape} pixels need {shape}."
            )
        if not self.depths or np.any(np.diff(self.depths) <= 0):
            raise ValueError(f"`Slices.depths` must increase and not be empty, got {self.depths}.")


def slices_from_atoms(
    atoms: ase.Atoms,
    sampling: float | tuple[float, float],
    slice_thickness: float,
    divisor: int = 1,
    dtype: type = np.float32,
) -> Slices:
    """Slices of independent atoms in a cell that is periodic across the beam.

    ASE's z is the beam, its x and y are our x and y. `sampling` in Å (one value or (y, x)) is
    rounded down so that a number of pixels that is fast to transform, a multiple of `divisor`,
    fills the cell. Space is cut at multiples of `slice_thickness` (Å); the atoms of a slice are
    projected, whole, onto their mean depth, and slices without atoms are left out.

    **Raises:** ValueError for a cell that is not orthogonal, no atoms, or a length that is not
    positive.
    """
    extent = _lateral_extent(atoms)
    if len(atoms) == 0:
        raise ValueError("`slices_from_atoms` needs at least one atom, got an empty structure.")
    if slice_thickness <= 0 or np.min(sampling) <= 0:
        raise ValueError(
            f"`sampling` and `slice_thickness` must be positive, got {sampling} Å and "
            f"{slice_thickness} Å."
        )
    finest = np.broadcast_to(np.asarray(sampling, float), (2,))
    ny, nx = (_pixels(e / d, divisor) for e, d in zip(extent, finest, strict=True))
    grid = Grid((ny, nx), (extent[0] / ny, extent[1] / nx))
    y, x, z = np.asarray(atoms.positions, float)[:, [1, 0, 2]].T
    _, slot = np.unique(np.floor(z / slice_thickness), return_inverse=True)
    depths = np.bincount(slot, z) / np.bincount(slot)
    # Cut by rank instead of depth, so that empty slices are never made.
    ranked, edges = np.stack([y, x, slot + 0.5], axis=-1), np.arange(len(depths) + 1.0)
    potential = projected_potential(np.asarray(atoms.numbers), ranked, grid, edges)
    return Slices(jnp.asarray(potential, dtype), tuple(float(d) for d in depths), grid)


def _pixels(least: float, divisor: int) -> int:
    """The smallest multiple of `divisor` not below `least` with a quotient of factors 2, 3, 5."""
    count = max(1, math.ceil(least / divisor - 1e-6))
    while _largest_factor(count) > 5:
        count += 1
    return divisor * count


def _largest_factor(count: int) -> int:
    for prime in (2, 3, 5):
        while count % prime == 0 and count > prime:
            count //= prime
    return count


def _lateral_extent(atoms: ase.Atoms) -> tuple[float, float]:
    """Length (y, x) of an orthogonal cell, Å."""
    cell = np.asarray(atoms.cell)
    away = np.abs(cell - np.diag(np.diag(cell))).max()
    if away > 1e-6 * max(np.abs(cell).max(), 1.0):
        raise ValueError(
            "The cell must be orthogonal with its vectors along x, y and z (z is the beam), got "
            f"{cell.tolist()}; make an orthogonal supercell first (ase.build.make_supercell)."
        )
    x, y = float(cell[0, 0]), float(cell[1, 1])
    if min(x, y) <= 0:
        raise ValueError(
            f"The cell needs positive lengths along x and y, got {x:.4g} and {y:.4g} Å; set one "
            "with `atoms.set_cell` or `atoms.center(vacuum=...)`."
        )
    return y, x
