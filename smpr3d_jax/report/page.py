"""A report that one file holds: the sections to leaf through, the curves, the frames, the numbers.

The HTML page (its frame is `page.html`) needs no network and no other file: the volume is embedded
as integers from which a script draws sections and cuts, pictures as PNG, text escaped. A volume
that would make the page heavy is embedded more coarsely, and the page says so.
"""

import base64
import html
import importlib.resources
import io
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Real
from ruamel.yaml import YAML

from . import refined as refinement, store
from .figures import (
    array_png,
    Box,
    evenly,
    frame_pair,
    grouped,
    inside,
    nice_length,
    robust_range,
    spans_decades,
)
from .volumes import Depths, Pair, pair


VOLUME_BYTES = 3_000_000
_CURVE_POINTS = 500
_FRAME_PIXELS = 160
_SELECTED_PLANES = 12
_RAISED = str.maketrans("−0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Template(string.Template):
    delimiter = "%%"  # a single % and $ are CSS's and JavaScript's


def report_page(
    path: store.Path,
    *,
    title: str,
    sections: Real[Any, "z y x"],
    depths: Depths,
    pixel_size: Pair,
    origin: Pair = 0.0,
    history: Mapping[str, Any] | None = None,
    frames: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    numbers: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    scan_box: Box | None = None,
    subtitle: str = "",
    centred: bool = False,
    noise: float | None = None,
    stopped: int | None = None,
    refined: Sequence[Mapping[str, Any]] = (),
    offsets: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
) -> None:
    """Write a self-contained HTML report.

    **Arguments:** `sections` rad, an array or an open HDF5 dataset, read plane by plane; `depths`,
    `pixel_size`, `origin` and `scan_box` Å, as in `figures.sections`; `history` as in
    `figures.convergence`; `frames`, each with `label`, `data` and `model` (ky, kx), zero frequency
    in the corner unless `centred`; `numbers`, each a value or (value, unit); `settings` any nested
    facts; `notes` sentences that a reader should not miss. `noise` is the deviance per pixel that
    noise alone allows and `stopped` the iteration whose model was kept; `refined` parameters and
    `offsets` of positions are as `report.refined` has them; `layers` has a `potential` (layers, y,
    x) in V Å on square pixels, and its `z` in Å.

    **Raises:** ValueError where the depths do not match the planes, a history is not a series, or a
    refined parameter lacks what it needs.
    """
    z = np.asarray(depths, float)
    if len(sections.shape) != 3 or sections.shape[0] != len(z) or 0 in sections.shape:
        raise ValueError(
            f"`sections` of shape {sections.shape} need one depth a plane, got {len(z)} depths."
        )
    volume, hint = _volume(sections, z, pair(pixel_size), pair(origin), scan_box)
    curves = _curves(history or {}, noise, stopped)
    parameters = [refinement.parameter(facts) for facts in refined]
    shown = {"volume": volume, "history": curves, "refined": refinement.charts(parameters)}
    potential, grey = _layers(layers) if layers else ("", "")
    fields = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "numbers": "".join(number(name, value) for name, value in (numbers or {}).items()),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in notes),
        "volume_hint": html.escape(hint),
        **_stage(sections.shape, pair(pixel_size)),
        "start": volume["start"],
        "series": _selection(sections, z, volume["view"]),
        "verdict": html.escape(verdict(history or {}, noise, stopped)),
        "parameters": refinement.table_rows(parameters),
        "offsets": refinement.pictures(refinement.position_offsets(offsets)) if offsets else "",
        "layers": potential,
        "layers_hint": html.escape(grey),
        "frames": "".join(_frame(frame, centred) for frame in frames),
        "settings": _settings(settings or {}),
    }
    _write(path, fields, shown)


def _stage(shape: tuple[int, ...], pixel: tuple[float, float]) -> dict[str, Any]:
    """The last plane, the shape of all, and their scale bar."""
    height, width = (n * d for n, d in zip(shape[1:], pixel, strict=True))
    bar = nice_length(width)
    return {
        "last": shape[0] - 1,
        "aspect": f"{width:.6g} / {height:.6g}",
        "bar_percent": f"{100 * bar / width:.4g}",
        "bar_label": f"{bar:g} Å",
    }


def _write(path: store.Path, fields: dict[str, Any], data: dict[str, Any]) -> None:
    """Fill the frame of the page, and hide the parts that have nothing to show."""
    texts = {
        "numbers": ("numbers", "notes"), "verdict": ("verdict",), "parameters": ("parameters",),
        "refined": ("parameters", "offsets"), "layers": ("layers",), "frames": ("frames",),
        "settings": ("settings",),
    }  # fmt: skip
    absent = {part: not any(fields[name] for name in names) for part, names in texts.items()}
    absent |= {"history": not data["history"], "box": data["volume"]["box"] is None}
    hidden = {f"hide_{part}": " hidden" if nothing else "" for part, nothing in absent.items()}
    # Nothing in the text may end the script.
    script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = _template().substitute(fields | hidden, data=script)
    with store.replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def style() -> str:
    """The style sheet that pages share."""
    return _template().template.partition("<style>")[2].partition("</style>")[0]


def _template() -> _Template:
    folder = importlib.resources.files(__name__.rpartition(".")[0])
    return _Template(folder.joinpath("page.html").read_text(encoding="utf-8"))


def _volume(
    sections: Any,
    depths: np.ndarray,
    pixel: tuple[float, float],
    origin: tuple[float, float],
    box: Box | None,
) -> tuple[dict[str, Any], str]:
    """The embedded volume with all that its viewer needs, and what a reader must know of it."""
    bits, binning = _coarseness(sections.shape)
    step = tuple(binning * d for d in pixel)
    corner = tuple(start + (binning - 1) / 2 * d for start, d in zip(origin, pixel, strict=True))
    window = inside(sections.shape, box, pixel, origin)
    contrast, planes = [], []
    for plane in sections:
        plane = np.asarray(plane, float)
        contrast.append(_rms(plane[window]))
        planes.append(_binned(plane, binning).astype(np.float32))
    volume = np.stack(planes)
    view = robust_range(volume[(slice(None), *inside(volume.shape, box, step, corner))])
    low, high = _span(volume[np.isfinite(volume)], view, bits)
    hint = "" if binning == 1 else f" Shown binned {binning} × {binning}."
    facts = {
        "shape": volume.shape,
        "bits": bits,
        "low": low,
        "high": high,
        "view": view,
        "values": _base64(_quantised(volume, low, high, bits).tobytes()),
        "depths": [float(f"{depth:.6g}") for depth in depths],
        "pixel": step,
        "origin": corner,
        "box": None if box is None else [float(edge) for edge in box],
        "contrast": contrast,
        "start": int(np.argmax(contrast)),
    }
    return facts, hint


def _coarseness(shape: tuple[int, ...]) -> tuple[int, int]:
    """Bits of a value, and pixels to bin along both axes, that keep a volume within its bytes."""
    for bits, binning in [(16, 1), *((8, n) for n in range(1, max(shape[1:]) + 1))]:
        pixels = shape[0] * max(shape[1] // binning, 1) * max(shape[2] // binning, 1)
        if pixels * bits // 8 <= VOLUME_BYTES:
            return bits, binning
    return 8, max(shape[1:])


def _binned(image: Real[np.ndarray, "y x"], binning: int) -> Float[np.ndarray, "y2 x2"]:
    """Means over squares of `binning` pixels; what does not fill a square is left out."""
    by, bx = (min(binning, n) for n in image.shape)
    ny, nx = image.shape[0] // by, image.shape[1] // bx
    return image[: ny * by, : nx * bx].astype(float).reshape(ny, by, nx, bx).mean(axis=(1, 3))


def _rms(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std()) if finite.size else 0.0


def _span(finite: np.ndarray, view: tuple[float, float], bits: int) -> tuple[float, float]:
    """The values of the first and the last integer: all of them, or with 8 bits those shown."""
    low, high = (float(finite.min()), float(finite.max())) if finite.size else view
    if bits == 8:
        reach = (view[1] - view[0]) / 2
        low, high = max(low, view[0] - reach), min(high, view[1] + reach)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _quantised(
    volume: Float[np.ndarray, "z y x"], low: float, high: float, bits: int
) -> Integer[np.ndarray, "z y x"]:
    """Integers from 1 at `low` to 2^bits - 1 at `high`; 0 where there is no value."""
    scaled = 1 + (2**bits - 2) * np.clip((volume - low) / (high - low), 0, 1)
    return np.where(np.isfinite(volume), np.rint(np.nan_to_num(scaled)), 0).astype(f"<u{bits // 8}")


def _selection(sections: Any, depths: np.ndarray, view: tuple[float, float]) -> str:
    """Some sections as small pictures, evenly spaced, that lead to their planes."""
    items = []
    for index in evenly(len(depths), _SELECTED_PLANES):
        label = f"{_decimal(float(depths[index]))} Å"
        image = _small(np.asarray(sections[int(index)], float))
        picture = _img(image, *view, "gray", f"Section at {label}")
        items.append(
            f'<button type="button" data-plane="{index}">{picture}'
            f'<span class="tag tl">{label}</span></button>'
        )
    return "".join(items)


def _layers(layers: Mapping[str, Any]) -> tuple[str, str]:
    """A picture of each layer in one grey scale, and what a reader must know of them."""
    if missing := {"potential", "z"} - set(layers):
        raise ValueError(f"`layers` need `potential` and `z`; {sorted(missing)} missing.")
    images, z = np.asarray(layers["potential"], float), np.asarray(layers["z"], float)
    if images.ndim != 3 or images.shape[:1] != z.shape:
        raise ValueError(
            f"`layers`: a `potential` of shape {images.shape} needs one `z` a layer, got {z.shape}."
        )
    images = images - images.mean(axis=(1, 2), keepdims=True)
    low, high = robust_range(images)
    pictures = []
    for image, depth in zip(images, z, strict=True):
        label = f"{_decimal(depth)} Å"
        picture = _img(_small(image), low, high, "gray", f"Potential at {label}")
        pictures.append(f"<figure><figcaption>{label}</figcaption>{picture}</figure>")
    grey = f"Grey from {_decimal(low)} to {_decimal(high)} V Å, the mean of each layer taken off."
    return "".join(pictures), grey


def _frame(frame: Mapping[str, Any], centred: bool) -> str:
    missing = {"label", "data", "model"} - set(frame)
    if missing:
        raise ValueError(f"A frame needs `label`, `data` and `model`; {sorted(missing)} missing.")
    images, _ = frame_pair(frame["data"], frame["model"], "linear", centred)
    images, high = frame_pair(_small(images[0]), _small(images[1]), "sqrt", centred=True)
    label = str(frame["label"])
    data, model = (
        _img(image, 0.0, high, "inferno", f"{label}, {kind}")
        for image, kind in zip(images, ("data", "model"), strict=True)
    )
    return (
        f"<figure><figcaption>{html.escape(label)}</figcaption>{data}{model}"
        "<span>data</span><span>model</span></figure>"
    )


def _small(image: np.ndarray) -> np.ndarray:
    return _binned(image, math.ceil(max(image.shape) / _FRAME_PIXELS))


def _img(image: np.ndarray, low: float, high: float, cmap: str, text: str) -> str:
    source = png_source(array_png(image, low, high, cmap))
    return f'<img src="{source}" alt="{html.escape(text)}">'


def png_source(content: bytes) -> str:
    """A PNG file as the source of an image inside the page."""
    return f"data:image/png;base64,{_base64(content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def verdict(history: Mapping[str, Any], noise: float | None, stopped: int | None) -> str:
    """What the held-out deviance says of the model, in a sentence or two."""
    series = grouped(history).get("deviance", {})
    held_out = [points for name, points in series.items() if "held" in name.lower()]
    sentences = []
    if held_out and noise:
        at = -1 if stopped is None else int(np.argmin(abs(held_out[0][:, 0] - stopped)))
        value = held_out[0][at, 1]
        sentences.append(
            f"Held-out deviance {value:.4g} per pixel; noise alone allows {noise:.4g}: "
            f"ratio {value / noise:.3g}."
        )
    if stopped is not None:
        sentences.append(f"The model is that of iteration {stopped}.")
    return " ".join(sentences)


def _curves(
    history: Mapping[str, Any], noise: float | None, stopped: int | None
) -> list[dict[str, Any]]:
    """The series of a history by chart, thinned to what a screen can show."""
    charts = []
    for title, series in grouped(history).items():
        ends = [
            f"{name} from {points[0, 1]:.4g} to {points[-1, 1]:.4g} at iteration {points[-1, 0]:g}"
            for name, points in series.items()
        ]
        thinned = [
            {"name": name, "points": points[evenly(len(points), _CURVE_POINTS)].tolist()}
            for name, points in series.items()
        ]
        charts.append(
            {
                "title": "R-factor" if title == "r_factor" else title,
                "log": spans_decades(np.concatenate([points[:, 1] for points in series.values()])),
                "summary": "; ".join(ends),
                "series": thinned,
                "level": noise if title == "deviance" else None,
                "mark": stopped if title == "deviance" else None,
            }
        )
    return charts


def number(name: str, value: Any) -> str:
    """One of the key numbers, a value or (value, unit), as a definition in HTML."""
    unit = ""
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], str):
        value, unit = value
    value = store.plain(value, name)
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, int):
        text = f"{value:,}".replace(",", "\u202f")
    elif isinstance(value, float):
        text = _decimal(value) if math.isfinite(value) else "–"
    else:
        text = "–" if value is None else str(value)
    text = html.escape(text)
    return (
        f"<div><dt>{html.escape(name)}</dt><dd>{text} <small>{html.escape(unit)}</small></dd></div>"
    )


def _decimal(value: float) -> str:
    """Four digits, with a power of ten where it is needed: −25, 0.1102, 6.4 × 10⁶."""
    mantissa, _, exponent = f"{value:.4g}".replace("-", "−").partition("e")
    if not exponent:
        return mantissa
    power = exponent.lstrip("+0").replace("−0", "−").translate(_RAISED)
    return f"{mantissa} × 10{power}"


def _settings(settings: Mapping[str, Any]) -> str:
    """Nested facts as YAML, escaped, with the keys set off."""
    if not settings:
        return ""
    yaml, stream = YAML(), io.StringIO()
    yaml.default_flow_style, yaml.width = None, 100
    yaml.dump(store.plain(settings, "settings"), stream)
    text = html.escape(stream.getvalue().rstrip())
    return re.sub(r"(?m)^(\s*(?:- )*)([\w.\-]+)(?=:(?:\s|$))", r"\1<b>\2</b>", text)
