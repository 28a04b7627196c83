"""Figures from arrays, whatever made them.

Every function returns a `matplotlib.figure.Figure` that belongs to nobody: no window, no `pyplot`
state, so that it works on a node without a screen; `figure.savefig(path)` keeps it. Images are
drawn with the first row at the top; lengths are in Å; frames come with the zero frequency in the
corner (`centred=True`: already in the middle).
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.image
import numpy as np
from jaxtyping import Complex, Float, Real
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .volumes import Depths, Pair, pair


Box = Sequence[float | int] | Real[Any, "4"]
"""(top, left, bottom, right) in Å, in the coordinates of `origin`."""

_PANELS = ("loss", "deviance", "r_factor")
_LEVELS = ("noise", "noise_held_out")


def robust_range(
    volume: Real[Any, "z y x"], low: float = 0.5, high: float = 99.5, planes: int = 16
) -> tuple[float, float]:
    """The percentiles `low` and `high` of a volume, judged by some evenly spaced planes of it."""
    chosen = evenly(len(volume), planes)
    values = np.stack([np.asarray(volume[int(i)], float) for i in chosen])
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    bottom, top = (float(p) for p in np.percentile(finite, (low, high)))
    return (bottom, top) if top > bottom else (bottom - 0.5, bottom + 0.5)


def evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices of `count`, the first and the last among them."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, limit))).astype(int))


def nice_length(extent: float) -> float:
    """A round number (1, 2 or 5 times a power of ten) near a quarter of `extent`."""
    power = 10.0 ** np.floor(np.log10(extent / 4))
    return float(power * max(step for step in (1, 2, 5) if step * power <= extent / 4 * 1.0001))


def inside(
    shape: tuple[int, ...], box: Box | None, pixel_size: Pair, origin: Pair
) -> tuple[slice, slice]:
    """The pixels (y, x) of a plane whose centres lie inside a box; all where there are none."""
    if box is None:
        return slice(None), slice(None)
    result = []
    for n, low, high, d, start in zip(
        shape[-2:], box[:2], box[2:], pair(pixel_size), pair(origin), strict=True
    ):
        first, last = np.ceil((low - start) / d - 1e-6), np.floor((high - start) / d + 1e-6)
        first, last = max(int(first), 0), min(int(last) + 1, n)
        result.append(slice(first, last) if last > first else slice(None))
    return result[0], result[1]


def sections(
    images: Real[Any, "z y x"],
    depths: Depths,
    pixel_size: Pair | None = None,
    *,
    origin: Pair = 0.0,
    scan_box: Box | None = None,
    limits: Sequence[float | int] | None = None,
    max_panels: int = 12,
) -> Figure:
    """Depth sections side by side in one grey scale, evenly chosen where there are too many.

    **Arguments:** `images` rad, a plane a depth; `pixel_size` Å, without which there is no scale
    bar; `scan_box`, a frame drawn into each panel, inside which the grey scale is judged;
    `limits`, the grey scale itself, rad.
    """
    _same_length(images, depths)
    step = pair(1.0 if pixel_size is None else pixel_size)
    start = pair(origin)
    rows_of, columns_of = inside(images.shape, scan_box, step, start)
    chosen = evenly(len(depths), max_panels)
    planes = np.stack([np.asarray(images[int(i)], float) for i in chosen])
    low, high = limits or robust_range(planes[:, rows_of, columns_of])
    figure, axes = _panels(len(chosen), images.shape[1] * step[0] / (images.shape[2] * step[1]))
    extent = _extent(planes[0].shape, step, start)
    for axis, plane, z in zip(axes, planes, np.asarray(depths, float)[chosen], strict=True):
        axis.imshow(plane, cmap="gray", vmin=low, vmax=high, extent=extent)
        _caption(axis, f"{z:.4g} Å".replace("-", "−"))
        if scan_box is not None:
            _draw_box(axis, scan_box)
    if pixel_size is not None:
        _scale_bar(axes[0], images.shape[2] * step[1], nice_length(images.shape[2] * step[1]))
    figure.colorbar(
        axes[0].images[0], ax=axes, label="phase (rad)", shrink=0.8, aspect=30, pad=0.01
    )
    return figure


def depth_profile(
    volume: Real[Any, "z y x"],
    depths: Depths,
    pixel_size: Pair | None = None,
    *,
    origin: Pair = 0.0,
    scan_box: Box | None = None,
    row: int | None = None,
) -> Figure:
    """The contrast of every section against its depth, beside a cut (z, x) through the volume.

    The contrast is the rms of the phase about its mean in the plane (inside `scan_box`); the cut
    is along `row`, the middle one by default.
    """
    z = _same_length(volume, depths)
    step, start = pair(1.0 if pixel_size is None else pixel_size), pair(origin)
    window = inside(volume.shape, scan_box, step, start)
    contrast = [float(np.nanstd(np.asarray(plane, float)[window])) for plane in volume]
    chosen = volume.shape[1] // 2 if row is None else row
    cut = np.stack([np.asarray(plane[chosen], float) for plane in volume])
    low, high = robust_range(cut[None])

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    left.plot(contrast, z, color="C0")
    left.set(xlabel="rms contrast (rad)", ylabel="depth (Å)", xlim=(0, None))
    edges_x = start[1] + step[1] * (np.arange(cut.shape[1] + 1) - 0.5)
    shown = right.pcolormesh(edges_x, _edges(z), cut, cmap="gray", vmin=low, vmax=high)
    unit = "px" if pixel_size is None else "Å"
    right.set(xlabel=f"x ({unit})", title=f"y = {start[0] + chosen * step[0]:.4g} {unit}")
    right.set_ylim(_edges(z).max(), _edges(z).min())  # down along the beam
    figure.colorbar(shown, ax=right, label="phase (rad)")
    return figure


def convergence(
    history: Mapping[str, Any], noise: float | None = None, stopped: int | None = None
) -> Figure:
    """What was recorded during the iterations: losses, held-out deviance, R-factors.

    **Arguments:** `history` holds series by name: values, one an iteration, or pairs
    (iteration, value) as an array (n, 2). Series share a panel whose names contain the same word
    of "loss", "deviance", "r_factor"; "noise" and "noise_held_out" are left out. `noise`, the
    deviance per pixel that noise alone allows, and `stopped`, the iteration whose model was kept,
    are lines in the panel of the deviance.
    """
    groups = grouped(history)
    count = max(len(groups), 1)
    figure = Figure(figsize=(min(4.2 * count, 12.6), 3.2 * -(-count // 3)), layout="constrained")
    for place, (group, series) in enumerate(groups.items()):
        axis = figure.add_subplot(-(-count // 3), min(count, 3), place + 1)
        for name, points in series.items():
            axis.plot(points[:, 0], points[:, 1], label=name, marker="." if len(points) < 3 else "")
        values = np.concatenate([points[:, 1] for points in series.values()])
        if spans_decades(values):
            axis.set_yscale("log")
        axis.margins(y=0.08)
        if group == "deviance":
            if noise is not None:
                axis.axhline(noise, color="0.4", ls=":", label=f"noise alone: {noise:.4g}")
            if stopped is not None:
                axis.axvline(stopped, color="0.4", ls="--", lw=0.9, label=f"kept: {stopped}")
        label = "R-factor" if group == "r_factor" else group
        axis.set(xlabel="iteration", ylabel=label, xlim=(min(0, axis.get_xlim()[0]), None))
        axis.legend(frameon=False)
    return figure


def grouped(history: Mapping[str, Any]) -> dict[str, dict[str, Float[np.ndarray, "points 2"]]]:
    """The series of a history as (iteration, value), by the panel that they share.

    Without "noise" and "noise_held_out", which are a line in the panel of the deviance.
    """
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, values in history.items():
        if name in _LEVELS:
            continue
        points = np.asarray(values, float)
        if points.ndim == 1:
            points = np.stack([np.arange(1.0, len(points) + 1), points], axis=-1)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(
                f"history[{name!r}] has shape {points.shape}; give values, one an iteration, or "
                "pairs (iteration, value) as an array (n, 2)."
            )
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            word = name.lower().replace("-", "_").replace(" ", "_")
            # deviance first: a "deviance loss" is not on the scale of a training loss
            panel = next((p for p in reversed(_PANELS) if p in word), name)
            groups.setdefault(panel, {})[name] = points
    return groups


def spans_decades(values: np.ndarray) -> bool:
    """Whether a logarithmic axis shows more: positive, and over a factor of twenty."""
    return bool(values.min() > 0 and values.max() > 20 * values.min())


def frames(
    model: Real[Any, "frames ky kx"],
    data: Real[Any, "frames ky kx"],
    labels: Sequence[str] | None = None,
    *,
    scale: str = "sqrt",
    centred: bool = False,
    max_frames: int = 6,
) -> Figure:
    """Measured frames above the model's, each pair in one scale ("sqrt", "log" or "linear")."""
    if np.shape(model) != np.shape(data):
        raise ValueError(f"`model` {np.shape(model)} and `data` {np.shape(data)} differ in shape.")
    chosen = evenly(len(data), max_frames)
    figure = Figure(figsize=(1.9 * len(chosen) + 0.5, 4.2), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        pictures, high = frame_pair(data[int(index)], model[int(index)], scale, centred)
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture, cmap="inferno", vmin=0, vmax=high)
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(labels[index] if labels else f"frame {index}", fontsize="medium")
    for axis, text in zip(axes[:, 0], ("data", "model"), strict=True):
        axis.set_ylabel(text)
    return figure


def frame_pair(
    data: Real[Any, "ky kx"],
    model: Real[Any, "ky kx"],
    scale: str = "sqrt",
    centred: bool = False,
) -> tuple[list[Float[np.ndarray, "ky kx"]], float]:
    """Two frames ready to be drawn from 0 to the second value: scaled, centre in the middle."""
    scales = {"sqrt": np.sqrt, "log": np.log1p, "linear": lambda image: image}
    if scale not in scales:
        raise ValueError(f"{scale=} is not one of {sorted(scales)}.")
    images = [np.maximum(np.nan_to_num(np.asarray(image, float)), 0) for image in (data, model)]
    if not centred:
        images = [np.fft.fftshift(image) for image in images]
    images = [scales[scale](image) for image in images]
    return images, max(float(np.percentile(images, 99.8)), 1e-12)


def complex_image(
    wave: Complex[Any, "y x"], pixel_size: Pair | None = None, title: str = ""
) -> Figure:
    """A wave: its amplitude as brightness, its phase as hue, and both as grey images beside."""
    values = np.asarray(wave)
    amplitude, phase = np.abs(values), np.angle(values)
    brightness = np.clip(amplitude / max(float(amplitude.max()), 1e-30), 0, 1)
    colours = hsv_to_rgb(
        np.stack([phase / (2 * np.pi) % 1, np.full_like(phase, 0.85), brightness], axis=-1)
    )
    step = pair(1.0 if pixel_size is None else pixel_size)
    extent = _extent(values.shape, step, (0.0, 0.0))
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    axes = list(figure.subplots(1, 3))
    axes[0].imshow(colours, extent=extent)
    shown = [
        axes[1].imshow(amplitude, cmap="gray", vmin=0, extent=extent),
        axes[2].imshow(phase, cmap="twilight", vmin=-np.pi, vmax=np.pi, extent=extent),
    ]
    for axis, text in zip(axes, (title or "wave", "amplitude", "phase (rad)"), strict=True):
        axis.set(title=text, xticks=[], yticks=[])
    for axis, image in zip(axes[1:], shown, strict=True):
        figure.colorbar(image, ax=axis, shrink=0.85)
    if pixel_size is not None:
        width = values.shape[1] * step[1]
        _scale_bar(axes[0], width, nice_length(width))
    return figure


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def array_png(
    image: Real[Any, "y x"], vmin: float | int, vmax: float | int, cmap: str = "gray"
) -> bytes:
    """An array as the bytes of a PNG file, one pixel a value, without axes."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(
        buffer, np.asarray(image, float), vmin=vmin, vmax=vmax, cmap=cmap, format="png"
    )
    return buffer.getvalue()


def _same_length(volume: Any, depths: Depths) -> np.ndarray:
    z = np.asarray(depths, float)
    if volume.ndim != 3 or len(volume) != len(z) or len(z) == 0:
        raise ValueError(
            f"A volume of shape {volume.shape} needs one depth a plane, got {len(z)} depths."
        )
    return z


def _panels(count: int, aspect: float) -> tuple[Figure, list[Axes]]:
    """Axes of equal size in rows, for images of height over width `aspect`."""
    fewest = range(3, 7) if count > 4 else [count]
    columns = min(fewest, key=lambda n: (-count % n, abs(n - (6 if count > 8 else 4))))
    rows = -(-count // columns)
    width = 1.75 * columns + 0.9
    figure = Figure(figsize=(width, 1.75 * aspect * rows + 0.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)  # pyright: ignore
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _extent(shape: tuple[int, ...], step: tuple[float, float], start: tuple[float, float]):
    """matplotlib's (left, right, bottom, top) of an image whose pixel (0, 0) is at `start`."""
    top, left = start[0] - step[0] / 2, start[1] - step[1] / 2
    return left, left + shape[1] * step[1], top + shape[0] * step[0], top


def _edges(z: np.ndarray) -> np.ndarray:
    """Borders between planes at the depths `z`."""
    if len(z) == 1:
        return np.array([z[0] - 0.5, z[0] + 0.5])
    middle = (z[1:] + z[:-1]) / 2
    return np.concatenate([[2 * z[0] - middle[0]], middle, [2 * z[-1] - middle[-1]]])


def _draw_box(axis: Axes, box: Box) -> None:
    top, left, bottom, right = (float(edge) for edge in box)
    axis.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, ls="--", lw=0.7, ec="#f2b134"
        )
    )


def _caption(axis: Axes, text: str) -> None:
    """A label in the image's upper left corner, legible on black and on white."""
    box = {"facecolor": "black", "alpha": 0.55, "pad": 2, "lw": 0}
    axis.text(
        0.03, 0.97, text, transform=axis.transAxes, va="top", color="white", fontsize=8, bbox=box
    )


def _scale_bar(axis: Axes, width: float, length: float) -> None:
    """A bar of `length` Å in the lower left corner of an image `width` Å wide."""
    share, place = length / width, axis.transAxes
    axis.add_patch(Rectangle((0.05, 0.05), share, 0.022, transform=place, fc="white", lw=0))
    box = {"facecolor": "black", "alpha": 0.55, "pad": 1.5, "lw": 0}
    axis.text(
        0.05 + share / 2, 0.1, f"{length:g} Å", transform=place, ha="center", va="bottom",
        color="white", fontsize=7, bbox=box,
    )  # fmt: skip
