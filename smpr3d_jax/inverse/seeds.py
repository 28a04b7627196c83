"""From the phase image of a direct method to the specimen at which an iteration starts."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data.counts import InputError
from ..physics.grid import Grid
from ..physics.optics import interaction_parameter
from ..physics.specimen import Slices
from .rasters import Raster


def slices_from_phase(
    phase: Float[Array, "slow fast"],
    raster: Raster,
    energy: float,
    grid: Grid,
    origin: tuple[float, float] = (0.0, 0.0),
    depths: Sequence[float | int] = (0.0,),
    fade: float = 2.0,
) -> Slices:
    """Slices on `grid` whose transmission is exp(i phase), shared equally by the planes `depths`.

    The phase (rad) is read between the points of its raster by cubic convolution (R. Keys, IEEE
    Trans. ASSP 29 (1981) 1153); beyond the raster it fades to 0 within `fade` steps. `origin`
    (y, x) in Å is the place of pixel (0, 0) of the field, in the frame of the positions.

    **Raises:** InputError for a phase that is not on the raster, or no depths.
    """
    if phase.shape != raster.shape or len(depths) == 0:
        raise InputError(
            f"`slices_from_phase` needs a phase on the points of its raster, {raster.shape}, and "
            f"at least one depth; got {phase.shape} and {len(depths)}."
        )
    y, x = grid.coordinates()
    points = np.stack(np.broadcast_arrays(y + origin[0], x + origin[1]), -1)
    index = raster.index(points)
    values = _between(np.asarray(phase, float), index)
    last = np.array(raster.shape) - 1
    outside = np.max(np.maximum(-index, index - last), axis=-1)
    values = values * np.clip(1 - outside / fade, 0, 1)
    share = values / interaction_parameter(energy) / len(depths)
    potential = np.broadcast_to(share, (len(depths), *grid.shape))
    planes = tuple(float(z) for z in depths)
    return Slices(jnp.asarray(potential, phase.dtype), planes, grid, origin)


def _between(
    image: Float[np.ndarray, "slow fast"], index: Float[np.ndarray, "y x 2"]
) -> Float[np.ndarray, "y x"]:
    """An image at fractional indices, by cubic convolution; edges are repeated."""
    base = np.floor(index).astype(int)
    part = index - base
    weights = [_keys(part - shift) for shift in range(-1, 3)]
    total = np.zeros(index.shape[:-1])
    for i, down in enumerate(weights):
        row = np.clip(base[..., 0] + i - 1, 0, image.shape[0] - 1)
        for j, across in enumerate(weights):
            column = np.clip(base[..., 1] + j - 1, 0, image.shape[1] - 1)
            total += down[..., 0] * across[..., 1] * image[row, column]
    return total


def _keys(distance: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Keys' kernel, a = -1/2: exact for parabolas."""
    d = np.abs(distance)
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))
