"""The report page: one file that needs no other, holds what it was given, and is read safely."""

import base64
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import h5py
import numpy as np
import pytest

from smpr3d_jax.report import page


DEPTHS = np.arange(-20.0, 15.0, 5.0)
SHAPE = (18, 24)


def sections():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    ramp = np.sin(0.5 * y)[None] * np.cos(0.3 * x)[None]
    return (ramp * (1 + np.arange(len(DEPTHS)))[:, None, None]).astype(np.float32)


def content(**change):
    frame = np.random.default_rng(0).poisson(3.0, (10, 12))
    return {
        "title": "Two tubes",
        "sections": sections(),
        "depths": DEPTHS,
        "pixel_size": 0.4,
        "origin": (-2.0, -3.0),
        "history": {"loss": np.linspace(3, 1, 2000), "R-factor held out": [[10, 0.2], [20, 0.1]]},
        "frames": [{"label": "scan 0, (3, 4)", "data": frame, "model": frame + 0.5}],
        "settings": {"beam": {"energy_ev": 80000}, "scans": [{"file": "scan_0.h5"}]},
        "numbers": {
            "R-factor": 0.1234567,
            "step": (0.4, "Å"),
            "dose": (1e5, "e/Å²"),
            "frames": 6400,
        },
        "notes": ["Scan step from the experiment file."],
        "scan_box": (0.0, 0.0, 4.0, 6.0),
    } | change


class Parsed(html.parser.HTMLParser):
    """Start tags with their attributes, and whether every one was closed."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(folder, **change):
    page.report_page(folder / "report.html", **content(**change))
    text = (folder / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.open == []
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match is not None
    return text, parsed, json.loads(match[1])


def test_the_page_refers_to_nothing_outside(tmp_path):
    text, parsed, _ = written(tmp_path)
    assert not re.search(r"https?:|//[a-z]+\.", text)
    for _tag, attributes in parsed.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "default-src 'none'" in text  # and the browser is told to load nothing


def test_the_slider_has_a_stop_for_every_plane(tmp_path):
    _, parsed, data = written(tmp_path)
    slider = next(facts for _, facts in parsed.tags if facts.get("id") == "depth")
    assert (slider["min"], slider["max"], slider["step"]) == ("0", str(len(DEPTHS) - 1), "1")
    assert data["volume"]["depths"] == DEPTHS.tolist()
    assert slider["value"] == str(data["volume"]["start"]) == "6"  # the strongest contrast


def unpacked(volume):
    integers = np.frombuffer(base64.b64decode(volume["values"]), f"<u{volume['bits'] // 8}")
    q = integers.reshape(volume["shape"]).astype(float)
    phase = volume["low"] + (volume["high"] - volume["low"]) * (q - 1) / (2 ** volume["bits"] - 2)
    return np.where(q == 0, np.nan, phase)


def test_the_embedded_volume_is_the_volume(tmp_path):
    images = sections()
    images[2, 3, 4] = np.nan
    _, _, data = written(tmp_path, sections=images)
    assert (data["volume"]["bits"], data["volume"]["pixel"]) == (16, [0.4, 0.4])
    step = (data["volume"]["high"] - data["volume"]["low"]) / 65534
    np.testing.assert_allclose(unpacked(data["volume"]), images, atol=0.51 * step)


def test_a_large_volume_is_embedded_coarsely_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "VOLUME_BYTES", len(DEPTHS) * 9 * 12)
    text, _, data = written(tmp_path)
    volume = data["volume"]
    assert volume["shape"] == [len(DEPTHS), 9, 12]
    assert volume["pixel"] == [0.8, 0.8]
    assert volume["origin"] == pytest.approx([-1.8, -2.8])  # the middle of two pixels
    assert "Shown binned 2 × 2" in text
    means = sections().reshape(-1, 9, 2, 12, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(unpacked(volume), means, atol=0.05)


def test_an_hdf5_dataset_is_read_as_an_array_is(tmp_path):
    expected, _, _ = written(tmp_path)
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file["phase"] = sections()
        text, _, _ = written(tmp_path, sections=file["phase"])
    assert text == expected


def test_forty_five_sections_stay_below_six_megabytes(tmp_path):
    images = np.random.default_rng(0).normal(size=(45, 120, 120)).astype(np.float32)
    written(tmp_path, sections=images, depths=np.arange(45.0))
    assert (tmp_path / "report.html").stat().st_size < 6e6


def test_text_is_escaped_everywhere(tmp_path):
    evil = "</script><script>alert('1')</script>&"
    frame = {"label": evil, "data": np.ones((4, 4)), "model": np.ones((4, 4))}
    text, parsed, data = written(
        tmp_path, title=evil, subtitle=evil, notes=[evil], numbers={evil: (evil, evil)},
        settings={evil: evil}, history={evil: [1.0, 2.0]}, frames=[frame],
    )  # fmt: skip
    assert "<script>alert" not in text
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert data["history"][0]["title"] == evil
    alternatives = [facts["alt"] for tag, facts in parsed.tags if tag == "img"]
    assert f"{evil}, data" in alternatives


def test_numbers_settings_and_curves_are_shown(tmp_path):
    text, _, data = written(tmp_path)
    assert "<dt>R-factor</dt><dd>0.1235 " in text
    assert "<dd>0.4 <small>Å</small>" in text
    assert "<dd>1 × 10⁵ <small>e/Å²</small>" in text
    assert "6\u202f400" in text
    assert "<b>beam</b>: {energy_ev: 80000}" in text
    charts = {chart["title"]: chart for chart in data["history"]}
    points = charts["loss"]["series"][0]["points"]
    assert (len(points), points[0], points[-1]) == (500, [1, 3], [2000, 1])
    assert charts["R-factor"]["summary"] == "R-factor held out from 0.2 to 0.1 at iteration 20"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-25.0, "−25"), (6.4e-7, "6.4 × 10⁻⁷"), (2.5e12, "2.5 × 10¹²"), (float("nan"), "–"),
        (None, "–"), (True, "yes"), (np.float32(0.5), "0.5"), (0, "0"), ("CPU", "CPU"),
    ],
)  # fmt: skip
def test_numbers_read_well(value, text):
    assert f"<dd>{text} <" in page.number("name", value)


def test_what_is_missing_is_not_shown(tmp_path):
    _, parsed, _ = written(
        tmp_path, history=None, frames=(), settings=None, numbers=None, notes=(), scan_box=None
    )
    shown = [
        f["aria-labelledby"] for tag, f in parsed.tags if tag == "section" and "hidden" not in f
    ]
    assert shown == ["h-sections"]


def test_every_control_and_picture_has_a_name(tmp_path):
    _, parsed, _ = written(tmp_path)
    labelled = {facts.get("for") for tag, facts in parsed.tags if tag == "label"}
    for tag, facts in parsed.tags:
        if tag == "img":
            assert facts["alt"]
        if tag == "input" and facts["type"] == "range":
            assert facts["id"] in labelled
        if tag == "canvas":
            assert facts["aria-label"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": DEPTHS[:-1]}, "one depth a plane, got 6"),
        ({"history": {"loss": np.ones((2, 3))}}, "history"),
        ({"frames": [{"label": "a"}]}, r"\['data', 'model'\] missing"),
        ({"settings": {"f": print}}, "settings/f"),
        ({"refined": [{"name": "C12", "value": 3}]}, r"missing \['found', 'start'\]"),
        ({"offsets": {"positions": np.ones((3, 2)), "offsets": np.ones((4, 2))}}, "frames, 2"),
    ],
)
def test_a_failing_report_leaves_the_old_one_and_nothing_else(tmp_path, change, message):
    before, _, _ = written(tmp_path)
    with pytest.raises(ValueError, match=message):
        written(tmp_path, **change)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def refinement():
    """What a refinement hands over: one parameter, one of two entries, and offsets."""
    rng = np.random.default_rng(2)
    defocus = {
        "name": "defocus", "unit": "Å", "start": [-150.0, 100.0], "found": [-149.2, 88.0],
        "error": [0.5, 0.7], "history": [[-149.5, 92.0], [-149.2, 88.0]],
    }  # fmt: skip
    return {
        "refined": [{"name": "camera <length>", "start": 0, "found": 0.98}, defocus],
        "offsets": {"positions": rng.uniform(0, 9, (30, 2)), "offsets": rng.normal(size=(30, 2))},
    }


def test_what_was_refined_is_told(tmp_path):
    text, parsed, data = written(tmp_path, **refinement())
    row = "<th scope=row>defocus 1</th><td>100.00</td><td>88.00</td><td>0.70</td><td>Å</td>"
    assert row in text
    assert "camera &lt;length&gt;</th><td>0</td><td>0.98</td><td>–</td><td></td>" in text
    (chart,) = data["refined"]
    assert chart["title"] == "defocus, change (Å)"
    assert chart["series"][1]["points"] == [[0, 0], [1, -8], [2, -12]]
    assert text.count('class="moves"') == text.count('class="bars"') == 1
    for tag, facts in parsed.tags:
        if tag == "svg" and "viewbox" in facts:
            assert facts["aria-label"]


def test_the_held_out_deviance_is_compared_with_the_noise(tmp_path):
    history = {"deviance_held_out": [0.9, 0.446, 0.45], "deviance": [0.8, 0.43, 0.42]}
    text, _, data = written(tmp_path, history=history, noise=0.417, stopped=2)
    said = "Held-out deviance 0.446 per pixel; noise alone allows 0.417: ratio 1.07. "
    assert f'id="verdict">{said}The model is that of iteration 2.</p>' in text
    (chart,) = data["history"]
    assert (chart["level"], chart["mark"]) == (0.417, 2)
    assert "ratio 1.08" in page.verdict(history, 0.417, None)  # the last one
    assert page.verdict({"loss": [1.0]}, 0.417, None) == ""
    assert '<p class="hint" id="verdict" hidden>' in written(tmp_path)[0]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("planes", [1, 7])
def test_the_script_runs_in_a_browser(tmp_path, planes):
    trust = {"noise": 1.0, "stopped": 3, "history": {"loss": [3, 2, 1], "deviance": [4, 2, 2]}}
    change = refinement() | trust
    written(tmp_path, sections=sections()[:planes], depths=DEPTHS[:planes], **change)
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
    ]  # fmt: skip
    address = pathlib.Path(tmp_path / "report.html").as_uri()
    done = subprocess.run(["chromium", *flags, address], capture_output=True, text=True, timeout=60)
    assert f"z = {DEPTHS[planes - 1]:g} Å</span>".replace("-", "−") in done.stdout
    assert done.stdout.count("<figcaption><strong>") == 5  # three charts, arrows, histogram
    assert "noise alone: 1</text>" in done.stdout
    assert "kept: 3</text>" in done.stdout


def test_layers_are_shown_without_their_means(tmp_path):
    potential = np.stack([sections()[3] + 50, -sections()[3]])
    text, parsed, _ = written(tmp_path, layers={"potential": potential, "z": [-3.0, 85.25]})
    shown = [f["alt"] for tag, f in parsed.tags if tag == "img" and "Potential" in f["alt"]]
    assert shown == ["Potential at −3 Å", "Potential at 85.25 Å"]
    assert "V Å, the mean of each layer taken off" in text
    section = next(f for t, f in parsed.tags if f.get("aria-labelledby") == "h-layers")
    assert "hidden" not in section
    _, parsed, _ = written(tmp_path)
    section = next(f for t, f in parsed.tags if f.get("aria-labelledby") == "h-layers")
    assert "hidden" in section


@pytest.mark.parametrize("z, said", [(None, r"\['z'\] missing"), ([1.0], "one `z` a layer")])
def test_layers_without_their_depths_are_refused(tmp_path, z, said):
    layers = {"potential": np.zeros((2, 4, 4))} | ({} if z is None else {"z": z})
    with pytest.raises(ValueError, match=said):
        written(tmp_path, layers=layers)
