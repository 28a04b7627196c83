"""A self-contained page of numbers, notes and figures; what a calibration or a plan shows."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from . import store
from .figures import png_bytes
from .page import number, png_source, style


class Picture(NamedTuple):
    """A figure, what it is, and what to look for in it."""

    title: str
    hint: str
    figure: Figure


def picture_page(
    path: store.Path,
    *,
    title: str,
    subtitle: str = "",
    numbers: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    pictures: Sequence[Picture] = (),
) -> None:
    """Write the page; `numbers` are values or (value, unit), as in `page.report_page`."""
    cells = "".join(number(name, value) for name, value in (numbers or {}).items())
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    body = "".join(_section(picture) for picture in pictures)
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{style()}
.picture img {{ max-width: 100%; height: auto; background: #fff; border-radius: 4px; }}
</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>
<section><h2>Key numbers</h2><dl class="numbers">{cells}</dl><ul class="notes">{said}</ul></section>
{body}
</body>
</html>
"""  # noqa: E501
    with store.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _section(picture: Picture) -> str:
    source = png_source(png_bytes(picture.figure, dpi=110))
    title, hint = html.escape(picture.title), html.escape(picture.hint)
    return (
        f'<section class="picture"><h2>{title}</h2><p class="hint">{hint}</p>'
        f'<img src="{source}" alt="{title}"></section>\n'
    )
