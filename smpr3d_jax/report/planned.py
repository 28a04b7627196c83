"""The picture of an experiment that is to be done: what its sections will show, and at what angle.

Frequencies in 1/Å, depths and distances in Å, angles in mrad.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def planned(
    frequencies: Float[np.ndarray, " q"],
    distances: Float[np.ndarray, " z"],
    transfer: Float[np.ndarray, "z q"],
    widths: Mapping[str, Float[np.ndarray, " q"]],
    angles: Float[np.ndarray, " angles"],
    depth_of_focus: Float[np.ndarray, " angles"],
    limits: Mapping[str, float],
    semiangle: float,
    *,
    thickness: float | None = None,
    spread: float | None = None,
) -> Figure:
    """Axial transfer, depth resolution against frequency, and depth of focus against semi-angle.

    **Arguments:** `transfer` of a layer at `distances` behind a section, 1 where it is shown whole;
    `widths`, curves by name over `frequencies`; `limits`, marked by name where they lie among
    `angles`; `semiangle`, the chosen one; `thickness` of the specimen and full width of the focal
    `spread` are lines across.
    """
    figure = Figure(figsize=(13.2, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _transfer(figure, left, frequencies, distances, transfer)
    for name, curve in widths.items():
        shown = np.isfinite(curve)
        middle.loglog(frequencies[shown], curve[shown], label=name)
    middle.set(xlabel="lateral frequency (1/Å)", ylabel="depth (Å)", title="depth resolution")
    right.loglog(angles, depth_of_focus, color="C0", label="depth of focus")
    _mark(right, angles, depth_of_focus, limits, semiangle)
    lines = {"specimen": (thickness, "--"), "focal spread": (spread, ":")}
    for name, (depth, style) in lines.items():
        if depth is not None:
            label = f"{name}, {depth:.3g} Å"
            middle.axhline(depth, color="0.5", ls=style, lw=0.9)
            right.axhline(depth, color="0.5", ls=style, lw=0.9, label=label)
    right.set(
        xlabel="semi-angle (mrad)", ylabel="depth (Å)", title="depth of focus",
        xlim=(angles[0], angles[-1]),
    )  # fmt: skip
    middle.legend(frameon=False, fontsize="small", loc="upper right")
    right.legend(frameon=False, fontsize="small", loc="lower left")
    return figure


def _transfer(figure: Figure, axis: Axes, frequencies, distances, transfer) -> None:
    shown = axis.pcolormesh(frequencies, distances, transfer, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.contour(frequencies, distances, transfer, levels=[0.5], colors="k", linewidths=0.8)
    axis.set(
        xlabel="lateral frequency (1/Å)", ylabel="distance of the layer (Å)",
        title="phase shown per radian (line: 0.5)",
    )  # fmt: skip
    axis.invert_yaxis()  # down along the beam
    figure.colorbar(shown, ax=axis)


def _mark(axis: Axes, angles, depths, limits: Mapping[str, float], semiangle: float) -> None:
    """Limits as lines with their names on top, and the chosen angle as a point."""
    last, height = 0.0, 0.98
    for name, angle in sorted(limits.items(), key=lambda item: item[1]):
        if angles[0] < angle < angles[-1]:
            # Names of neighbours stand below each other.
            height = 0.98 if angle > 1.12 * last or height < 0.4 else height - 0.22
            last = angle
            axis.axvline(angle, color="C3", lw=0.7)
            axis.text(
                angle, height, f"{name} ", transform=axis.get_xaxis_transform(), rotation=90,
                ha="right", va="top", fontsize="small", color="C3",
            )  # fmt: skip
    chosen = np.exp(np.interp(np.log(semiangle), np.log(angles), np.log(depths)))
    label = f"{semiangle:.3g} mrad, {chosen:.3g} Å"
    axis.plot([semiangle], [chosen], "o", color="C0", label=label)
