"""What a refinement found: the parameters' table and paths, and where the probe really stood.

A refined parameter is a mapping with `name`, `unit` (optional), `start` and `found` (a number or a
list of them, as one a scan), `error` (optional: standard errors, of the same length) and `history`
(optional: values (iterations,) or (iterations, entries), the first after iteration 1). Positions
and offsets are in Å, (y, x); pictures have y downwards.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real
from matplotlib.figure import Figure

from .figures import evenly


_ARROWS = 1600
_CURVE_POINTS = 300


class Parameter(NamedTuple):
    """One refined parameter as arrays, an entry a value."""

    name: str
    unit: str
    start: Float[np.ndarray, " entries"]
    found: Float[np.ndarray, " entries"]
    error: Float[np.ndarray, " entries"] | None
    history: Float[np.ndarray, "iterations entries"] | None

    @property
    def labels(self) -> list[str]:
        """The name, numbered where there are several entries."""
        if len(self.found) == 1:
            return [self.name]
        return [f"{self.name} {i}" for i in range(len(self.found))]

    @property
    def path(self) -> Float[np.ndarray, "iterations entries"]:
        """Start and history; of several entries the change, since they differ by more than it."""
        if self.history is None:
            return np.empty((0, len(self.found)))
        path = np.concatenate([self.start[None], self.history])
        return path - self.start if self._changes else path

    @property
    def title(self) -> str:
        """What `path` is, and its unit."""
        name = f"{self.name}, change" if self._changes else self.name
        return f"{name} ({self.unit})" if self.unit else name

    @property
    def _changes(self) -> bool:
        return len(self.found) > 1 and bool(np.isfinite(self.start).all())


class Offsets(NamedTuple):
    """How far the probe stood from its nominal positions, and in which scan."""

    positions: Float[np.ndarray, "frames 2"]
    offsets: Float[np.ndarray, "frames 2"]
    series: Int[np.ndarray, " frames"]

    @property
    def local(self) -> Float[np.ndarray, "frames 2"]:
        """Offsets less the mean of their scan, which is a shift of the whole image."""
        count = np.maximum(np.bincount(self.series), 1)
        mean = [np.bincount(self.series, column) / count for column in self.offsets.T]
        return self.offsets - np.stack(mean, -1)[self.series]


def parameter(facts: Mapping[str, Any]) -> Parameter:
    """Read one refined parameter.

    **Raises:** ValueError for a missing key, an unknown one, or lengths that do not agree.
    """
    known = {"name", "unit", "start", "found", "error", "history"}
    missing, extra = {"name", "start", "found"} - set(facts), set(facts) - known
    if missing or extra:
        raise ValueError(
            f"A refined parameter needs `name`, `start` and `found`, and may have `unit`, `error` "
            f"and `history`; missing {sorted(missing)}, not known {sorted(extra)}."
        )
    name = str(facts["name"])
    found = np.atleast_1d(np.asarray(facts["found"], float))
    given = {k: facts.get(k) for k in ("start", "error", "history")}
    values = {k: None if v is None else np.asarray(v, float) for k, v in given.items()}
    if found.ndim != 1:
        raise ValueError(f"Refined {name!r}: `found` has shape {found.shape}, not one axis.")
    for key in ("start", "error"):
        value = values[key]
        if value is not None and value.shape not in ((), found.shape):
            raise ValueError(
                f"Refined {name!r}: `{key}` of shape {value.shape}, but {len(found)} values found."
            )
        values[key] = None if value is None else np.broadcast_to(value, found.shape)
    path = values["history"]
    if path is not None:
        path = path[:, None] if path.ndim == 1 else path
        if path.ndim != 2 or path.shape[1] != len(found):
            raise ValueError(
                f"Refined {name!r}: `history` of shape {path.shape}; give (iterations,) or "
                f"(iterations, {len(found)}), a column for each value found."
            )
    start = values["start"]
    start = np.full(found.shape, np.nan) if start is None else start
    return Parameter(name, str(facts.get("unit", "")), start, found, values["error"], path)


def position_offsets(facts: Mapping[str, Any]) -> Offsets:
    """Read `positions`, `offsets` (frames, 2) and, for more than one scan, `series` (frames,).

    **Raises:** ValueError for one that is missing or shapes that do not agree.
    """
    missing = {"positions", "offsets"} - set(facts)
    if missing:
        raise ValueError(f"Offsets need `positions` and `offsets`; missing {sorted(missing)}.")
    positions, offsets = (np.asarray(facts[key], float) for key in ("positions", "offsets"))
    series = np.asarray(facts.get("series", np.zeros(len(positions))), int)
    same = positions.ndim == 2 and positions.shape == offsets.shape and positions.shape[1] == 2
    if not same or series.shape != positions.shape[:1] or len(series) == 0:
        raise ValueError(
            f"`positions` {positions.shape}, `offsets` {offsets.shape} and `series` {series.shape} "
            "must be (frames, 2), (frames, 2) and (frames,)."
        )
    return Offsets(positions, offsets, series)


def parameter_paths(refined: Sequence[Mapping[str, Any]]) -> Figure:
    """Each parameter against the iteration, from where it started; bars are standard errors.

    Parameters of several entries are shown by how far they have moved.
    """
    drawn = [p for p in map(parameter, refined) if len(p.path)]
    columns = max(1, min(3, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    for place, one in enumerate(drawn):
        axis = figure.add_subplot(rows, columns, place + 1)
        for i, (label, path) in enumerate(zip(one.labels, one.path.T, strict=True)):
            axis.plot(path, color=f"C{i}", label=label)
            if one.error is not None:
                axis.errorbar(len(path) - 1, path[-1], one.error[i], color=f"C{i}", capsize=3)
        axis.set(xlabel="iteration", ylabel=one.title, xlim=(0, None))
        if len(one.found) > 1:
            axis.legend(frameon=False, fontsize=7)
    return figure


def offset_map(
    positions: Real[Any, "frames 2"],
    offsets: Real[Any, "frames 2"],
    series: Int[Any, " frames"] | None = None,
) -> Figure:
    """Arrows from nominal to found positions, a panel a scan, and how long they are.

    Arrows leave out the mean of their scan, a shift of the whole image, and are drawn longer by the
    factor in the title.
    """
    facts = {"positions": positions, "offsets": offsets}
    all_of = position_offsets(facts if series is None else facts | {"series": series})
    scans, local, longer = np.unique(all_of.series), all_of.local, _exaggeration(all_of)
    figure = Figure(figsize=(2.9 * (len(scans) + 1), 3.3), layout="constrained")
    axes = figure.subplots(1, len(scans) + 1, squeeze=False)[0]
    for axis, scan in zip(axes, scans, strict=False):
        own = np.flatnonzero(all_of.series == scan)
        own = own[evenly(len(own), _ARROWS)]
        (y, x), (dy, dx) = all_of.positions[own].T, longer * local[own].T
        axis.quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=1, width=4e-3)
        axis.set_title(f"scan {scan}, arrows × {longer:g}", fontsize="medium")
        axis.set(aspect="equal", xlabel="x (Å)")
        axis.invert_yaxis()
    axes[0].set_ylabel("y (Å)")
    axes[-1].hist(np.hypot(*local.T), bins="auto", color="C0")
    axes[-1].set(xlabel="length of the offset (Å)", ylabel="frames", xlim=(0, None))
    return figure


def _exaggeration(found: Offsets) -> float:
    """A round factor that makes long arrows about as long as the positions are apart."""
    far = float(np.percentile(np.hypot(*found.local.T), 95))
    first = found.positions[found.series == found.series[0]]
    area = float(np.prod(np.maximum(np.ptp(first, axis=0), 1e-9)))
    apart = (area / max(len(first), 1)) ** 0.5
    wanted = max(apart / far, 1.0) if far > 0 and apart > 0 else 1.0
    power = 10.0 ** np.floor(np.log10(wanted))
    return float(power * max(step for step in (1, 2, 5) if step * power <= wanted * 1.0001))


def table_rows(refined: Sequence[Parameter]) -> str:
    """Rows of an HTML table: name, start, found, standard error, unit."""
    rows = []
    for one in refined:
        for i, label in enumerate(one.labels):
            error = float("nan") if one.error is None else float(one.error[i])
            cells = rounded(float(one.start[i]), float(one.found[i]), error)
            row = "".join(f"<td>{cell}</td>" for cell in cells)
            unit = html.escape(one.unit)
            rows.append(f"<tr><th scope=row>{html.escape(label)}</th>{row}<td>{unit}</td></tr>")
    return "".join(rows)


def rounded(start: float, found: float, error: float) -> tuple[str, str, str]:
    """Three numbers to the digits that the error leaves, two of its own; or to four digits."""
    if np.isfinite(error) and error > 0:
        places = max(0, 1 - int(np.floor(np.log10(error))))
        text = [f"{value:.{places}f}" if np.isfinite(value) else "–" for value in (start, found)]
        text.append(f"{error:.{places}f}" if places else f"{error:.2g}")
    else:
        text = [f"{value:.4g}" if np.isfinite(value) else "–" for value in (start, found)]
        text.append("–")
    start_text, found_text, error_text = (part.replace("-", "−") for part in text)
    return start_text, found_text, error_text


def charts(refined: Sequence[Parameter]) -> list[dict[str, Any]]:
    """The paths of the parameters as the page's charts take them, thinned, the start at 0."""
    result = []
    for one in refined:
        path = one.path
        chosen = evenly(len(path), _CURVE_POINTS) if len(path) else ()
        names = one.labels if len(one.found) == 1 else [str(i) for i in range(len(one.found))]
        series = []
        for name, values in zip(names, path.T, strict=True):
            points = [(int(i), float(values[i])) for i in chosen if np.isfinite(values[i])]
            series.append({"name": name, "points": points})
        kept = [s for s in series if s["points"]]
        ends = [
            f"{s['name']} from {s['points'][0][1]:.4g} to {s['points'][-1][1]:.4g}" for s in kept
        ]
        if kept:
            facts = {"title": one.title, "log": False, "summary": "; ".join(ends), "series": kept}
            result.append(facts)
    return result


def pictures(found: Offsets) -> str:
    """Arrows of each scan and a histogram of all lengths, as figures of inline SVG."""
    local, longer, parts = found.local, _exaggeration(found), []
    # One frame for all scans; few arrows reach beyond it.
    reach = longer * float(np.percentile(np.abs(local), 99))
    frame = found.positions.min(0) - reach, found.positions.max(0) + reach
    for scan in np.unique(found.series):
        own = np.flatnonzero(found.series == scan)
        mean = found.offsets[own].mean(0)
        rms = float(np.sqrt(np.mean(np.sum(local[own] ** 2, axis=1))))
        shift = f"shift ({mean[0]:.2f}, {mean[1]:.2f}) Å, rms {rms:.3f} Å".replace("-", "−")
        own = own[evenly(len(own), _ARROWS)]
        caption = f"<strong>Scan {scan}, arrows × {longer:g}</strong><span>{shift}</span>"
        text = f"Offsets of the probe in scan {scan}: {shift}"
        drawing = _arrows(found.positions[own], longer * local[own], frame, text)
        parts.append(f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>")
    parts.append(_histogram(np.hypot(*local.T)))
    return "".join(parts)


def _arrows(start: np.ndarray, move: np.ndarray, frame, text: str) -> str:
    low, high = frame
    size = max(float((high - low).max()), 1e-9)
    y, x = (100 * (start - low) / size).T
    v, u = (100 * (start + move - low) / size).T
    dots = "".join(f"M{a:.1f},{b:.1f}h0" for a, b in zip(x, y, strict=True))
    lines = "".join(
        f"M{a:.1f},{b:.1f}L{c:.1f},{d:.1f}" for a, b, c, d in zip(x, y, u, v, strict=True)
    )
    height, width = 100 * (high - low) / size
    return (
        f'<svg role="img" aria-label="{text}" viewBox="-2 -2 {width + 4:.1f} {height + 4:.1f}">'
        f'<path class="dots" d="{dots}"/><path class="moves" d="{lines}"/></svg>'
    )


def _histogram(lengths: np.ndarray) -> str:
    bins = min(40, max(8, int(len(lengths) ** 0.5)))
    counts, edges = np.histogram(lengths, bins, (0, float(lengths.max()) or 1.0))
    wide = 100 / len(counts)
    bars = "".join(
        f"M{i * wide:.2f},60V{60 - 56 * n / max(counts.max(), 1):.2f}h{wide:.2f}V60Z"
        for i, n in enumerate(counts)
    )
    ends = (
        f'<text x="0" y="68">{edges[0]:.3g} Å</text>'
        f'<text x="100" y="68" text-anchor="end">{edges[-1]:.3g} Å</text>'
    )
    middle = float(np.median(lengths))
    caption = f"<strong>Length of the offsets</strong><span>all scans, median {middle:.3g} Å</span>"
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<svg role="img" aria-label="Histogram of lengths, median {middle:.3g} Å" '
        f'viewBox="-2 0 104 70"><path class="bars" d="{bars}"/>{ends}</svg></figure>'
    )
