"""Pictures of a calibration: the disc and its edge, the search for the lens, the displacements.

Lengths in Å, angles in mrad, rotations in rad; images have y downwards.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def discs(
    patterns: Sequence[Real[np.ndarray, "ky kx"]],
    centers: Sequence[tuple[float, float]],
    radius: float,
    edges: Sequence[Float[np.ndarray, "points 2"]],
    used: Sequence[Bool[np.ndarray, " points"]],
) -> Figure:
    """Mean patterns with the points of half intensity (rejected ones red) and the fitted circle."""
    figure, axes = _row(len(patterns))
    turn = np.linspace(0, 2 * np.pi, 200)
    for axis, pattern, (y, x), edge, good in zip(axes, patterns, centers, edges, used, strict=True):
        axis.imshow(np.sqrt(np.clip(pattern, 0, None)), cmap="gray")
        axis.plot(x + radius * np.cos(turn), y + radius * np.sin(turn), lw=0.8, color="tab:cyan")
        axis.plot(edge[good, 1], edge[good, 0], ".", ms=2, color="tab:orange")
        axis.plot(edge[~good, 1], edge[~good, 0], "x", ms=4, color="tab:red")
        axis.plot(x, y, "+", ms=8, color="tab:cyan")
        axis.set_title(f"centre {y:.2f}, {x:.2f}", fontsize=9)
        axis.set_xlabel("pixels")
    return figure


def search(
    explained: Float[np.ndarray, "rotations defoci"],
    rotations: Float[np.ndarray, " rotations"],
    defoci: Float[np.ndarray, " defoci"],
    found: tuple[float, float],
) -> Figure:
    """Part of the images explained at each rotation and defocus, and where the fit ended."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.add_subplot()
    turn, defocus = np.rad2deg(found[0]), found[1]
    if turn >= 180:  # the map holds rotations up to 180°; the opposite lens is the same point
        turn, defocus = turn - 180, -defocus
    if len(rotations) > 1:
        image = axis.pcolormesh(defoci, np.rad2deg(rotations), explained, cmap="magma")
        axis.plot(defocus, turn, "o", ms=10, mfc="none", color="tab:cyan")
        axis.set_ylabel("rotation (°)")
        figure.colorbar(image, ax=axis, label="part explained")
    else:
        axis.plot(defoci, explained[0])
        axis.axvline(defocus, color="tab:cyan")
        axis.set_ylabel("part explained")
    axis.set_xlabel("defocus (Å)")
    return figure


def displacements(
    cells: Float[np.ndarray, "cells 2"],
    moved: Float[np.ndarray, "cells 2"],
    used: Bool[np.ndarray, " cells"],
    fitted: Float[np.ndarray, "cells 2"],
) -> Figure:
    """How far the image of each cell of the disc is displaced (orange), and the fit (grey)."""
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axis = figure.add_subplot()
    for vectors, color, width in ((fitted, "0.6", 0.006), (moved, "tab:orange", 0.003)):
        axis.quiver(
            cells[used, 1], cells[used, 0], vectors[used, 1], vectors[used, 0],
            color=color, angles="xy", width=width,
        )  # fmt: skip
    axis.plot(cells[~used, 1], cells[~used, 0], "x", ms=3, color="tab:red")
    axis.set(xlabel="mrad", ylabel="mrad", aspect="equal")
    axis.invert_yaxis()
    return figure


def images(named: Mapping[str, Real[np.ndarray, "_ _"]], field: tuple[float, float]) -> Figure:
    """Images of one `field` (y, x) Å beside each other, each in its own contrast."""
    figure, axes = _row(len(named))
    for axis, (name, image) in zip(axes, named.items(), strict=True):
        low, high = np.percentile(image, (0.5, 99.5))
        extent = (0, field[1], field[0], 0)
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, extent=extent)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("Å")
    return figure


def _row(count: int) -> tuple[Figure, list[Axes]]:
    """Axes side by side, five in a row."""
    columns = min(count, 5)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.9 * columns, 3.4 * rows), layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, list(axes[:count])
