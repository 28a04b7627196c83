"""Pictures of a calibration: electrons in the counts, the disc and its edge, a lattice, the lens.

Lengths in Å, angles in mrad, rotations in rad; images have y downwards.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Num, Real
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


def electrons(
    points: Float[np.ndarray, "groups 2"],
    values: Float[np.ndarray, "bins 2"],
    counts_per_electron: float,
    whole: bool,
) -> Figure:
    """Variance over mean of groups of pixels, and how often each count occurs.

    Grey: what single electrons would do; blue: electrons of `counts_per_electron` (nan: not known),
    on whose multiples values lie, if they are `whole` electrons.
    """
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    noise, often = figure.subplots(1, 2)
    mean, variance = points.T
    ends = np.array([mean.min(initial=0), mean.max(initial=1)])
    noise.plot(ends, ends, color="0.6", label="single electrons")
    known = np.isfinite(counts_per_electron) and abs(counts_per_electron - 1) > 1e-3
    if known:
        label = f"{counts_per_electron:.4g} counts an electron"
        noise.plot(ends, counts_per_electron * ends, color="tab:cyan", label=label)
    noise.plot(mean, variance, ".", ms=4, color="tab:orange", label="pixels alike in mean")
    noise.set(xlabel="mean count", ylabel="variance from frame to frame")
    noise.legend(fontsize=8)
    if known and whole and len(values):
        for number in np.arange(0, values[-1, 0], counts_per_electron):
            often.axvline(number, lw=0.7, color="tab:cyan")
    often.step(*values.T, where="mid", color="tab:orange")
    often.set(xlabel="count", ylabel="pixels", yscale="log")
    return figure


def lattice(
    images: Sequence[Num[np.ndarray, "_ _"]],
    spectra: Sequence[Float[np.ndarray, "_ _"]],
    peaks: Sequence[Float[np.ndarray, "_ 2"]],
    names: Sequence[str],
) -> Figure:
    """Images (the size of complex ones) over their power spectra, the peaks used in circles.

    `peaks` (y, x) in turns a position.
    """
    figure = Figure(figsize=(3.4 * len(images), 6.4), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for i, (image, spectrum, places) in enumerate(zip(images, spectra, peaks, strict=True)):
        shown = np.abs(image - image.mean()) if np.iscomplexobj(image) else image
        axes[0, i].imshow(shown, cmap="gray")
        axes[0, i].set_title(names[i], fontsize=9)
        axes[0, i].set_xlabel("positions")
        ny, nx = spectrum.shape
        edge = [(-(n // 2) - 0.5) / n for n in (ny, nx)]
        extent = (edge[1], edge[1] + 1, edge[0] + 1, edge[0])
        level = np.log10(np.maximum(spectrum, 1e-30))
        low, high = np.percentile(level, (20, 100))
        axes[1, i].imshow(level, cmap="magma", vmin=low, vmax=high, extent=extent)
        for y, x in np.concatenate([places, -places]):
            axes[1, i].plot(x, y, "o", ms=10, mfc="none", color="tab:cyan")
        axes[1, i].set(xlabel="turns a position", xlim=(-0.5, 0.5), ylim=(0.5, -0.5))
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
