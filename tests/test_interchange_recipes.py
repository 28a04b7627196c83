"""Aberrations, and parameter files of other packages, in ours: against formulas and arrays."""

import itertools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ruamel.yaml import YAML

import smpr3d_jax as sj
from smpr3d_jax import interchange
from smpr3d_jax.app.experiment import from_mapping
from smpr3d_jax.data.counts import InputError
from smpr3d_jax.physics.optics import aberration_phase, cartesian, POLAR, polar, wavelength


ORDERS = [name[1:] for name in POLAR if name[0] == "C"]
SIZE = {"1": 100, "2": 2e3, "3": 5e4, "4": 1e6, "5": 4e7}
PLANE = np.random.default_rng(0).uniform(-0.6, 0.6, (2, 30))


def numbers(seed=1):
    """A magnitude in Å and an angle in rad of every order."""
    rng = np.random.default_rng(seed)
    return {o: (float(SIZE[o[0]] * rng.normal()), float(rng.uniform(0, 6))) for o in ORDERS}


def ours(coefficients):
    """chi of our coefficients on `PLANE`, at 80 kV."""
    terms = {k: jnp.asarray([v]) for k, v in cartesian(coefficients).items()}
    ky, kx = (jnp.asarray(k) for k in PLANE)
    return np.asarray(aberration_phase(terms, ky, kx, 80e3))[0]


def theirs(values, angle, mirrored=False, reversed=False):
    """(2 pi/lambda) sum theta^(n+1)/(n+1) C cos(m (phi - angle(m, phi_nm)))."""
    ky, kx = -PLANE if reversed else PLANE
    lam, total = wavelength(80e3), 0.0
    phi = np.arctan2(kx, ky) if mirrored else np.arctan2(ky, kx)
    for order, (c, p) in values.items():
        n, m = int(order[0]), int(order[1])
        theta = lam * np.hypot(ky, kx)
        total = total + theta ** (n + 1) / (n + 1) * c * np.cos(m * phi - angle(m, p))
    return 2 * np.pi / lam * total


def test_py4dstem_counts_angles_from_axis_0(x64):
    values = numbers()
    named = {f"C{o}": c for o, (c, _) in values.items()}
    named |= {f"phi{o}": p for o, (_, p) in values.items() if o[1] != "0"}
    wanted = theirs(values, lambda m, p: m * p, mirrored=True)
    found = interchange.from_py4dstem(named)
    np.testing.assert_allclose(ours(found), wanted, rtol=1e-9)
    back = interchange.from_py4dstem(interchange.to_py4dstem(found))
    np.testing.assert_allclose(ours(back), wanted, rtol=1e-9)
    short = {"defocus": 30.0, "astigmatism": 4.0, "astigmatism_angle": np.pi / 2, "Cs": 5.0}
    assert interchange.from_py4dstem(short) == pytest.approx(
        {"C10": -30, "C12": 4, "phi12": 0, "C30": 5}
    )


def test_ptyrad_has_degrees_and_names_of_haider(x64):
    values = numbers()
    named = {f"C{o}": c for o, (c, _) in values.items()}
    named |= {f"phi{o}": float(np.degrees(p)) for o, (_, p) in values.items() if o[1] != "0"}
    wanted = theirs(values, lambda m, p: m * p)
    found = interchange.from_ptyrad(named)
    np.testing.assert_allclose(ours(found), wanted, rtol=1e-9)
    np.testing.assert_allclose(
        ours(interchange.from_ptyrad(interchange.to_ptyrad(found))), wanted, rtol=1e-9
    )
    parts = cartesian(found)
    np.testing.assert_allclose(ours(interchange.from_ptyrad(parts)), wanted, rtol=1e-9)
    haider = {"C1": 7.0, "A1": 2.0, "A1phi": 30.0, "B2": 5.0, "S3": 3.0, "S3phi": 10.0, "R5": 2.0}
    wanted = {"C10": 7, "C12": 2, "phi12": np.pi / 6, "C21": 15, "phi21": 0, "C32": 12,
              "phi32": np.pi / 18, "C54": 12, "phi54": 0}  # fmt: skip
    assert interchange.from_ptyrad(haider) == pytest.approx(wanted)
    old = {"probe_defocus": 20.0, "probe_c3": 3.0, "probe_c5": 4.0}
    assert interchange.from_ptyrad(old) == {"C10": -20, "C30": 3, "C50": 4}


def test_phaser_sees_the_aperture_from_behind(x64):
    """conj(ifft(exp(+i chi(k)))) is the wave of exp(-i chi(-k))."""
    values = numbers()
    listed = [
        {"n": int(o[0]), "m": int(o[1]), "mag": c, "angle": np.degrees(p) * (o[1] != "0")}
        for o, (c, p) in values.items()
        if o != "10"
    ]
    given = {"defocus": values["10"][0], "aberrations": listed}
    found = interchange.from_phaser(**given)
    wanted = theirs(values, lambda m, p: p * (m > 0), reversed=True)
    np.testing.assert_allclose(ours(found), wanted, rtol=1e-9)
    back = interchange.from_phaser(**interchange.to_phaser(found))
    np.testing.assert_allclose(ours(back), wanted, rtol=1e-9)
    sums = interchange.from_phaser(10.0, [{"C1": 5.0}, {"b2": {"re": 1, "im": 2}}, {"B2": 1j}])
    assert sums["C10"] == 15
    both = cartesian(sums)
    assert (both["C21a"], both["C21b"]) == pytest.approx((-3, -9))
    assert interchange.from_phaser(0.0, [{"S3": {"mag": 2.0}}]) == {
        "C10": 0, "C32": 6, "phi32": 0,
    }  # fmt: skip


WRONG_NAMES = [
    (lambda: interchange.from_ptyrad({"C13": 1}), "'C13' is no aberration that PtyRAD knows"),
    (lambda: interchange.from_ptyrad({"phi10": 1}), "'phi10' is no"),
    (lambda: interchange.from_ptyrad({"C30a": 1}), "'C30a' is no"),
    (lambda: interchange.from_ptyrad({"C3phi": 1}), "'C3phi' is no"),
    (lambda: interchange.from_ptyrad({"C3": 1, "Cs": 2}), "'Cs' gives coefficient C30 a second"),
    (lambda: interchange.from_ptyrad({"C12": 1, "C12a": 2}), "both as polar and as Cartesian"),
    (lambda: interchange.from_phaser(0.0, [{"S5": 1}]), "'S5' is no aberration that phaser"),
    (lambda: interchange.from_phaser(0.0, [{"n": 1, "m": 1, "re": 1}]), "no aberration of phaser"),
    (lambda: interchange.from_phaser(0.0, [{"a1": {"size": 1}}]), "`re` and `im`"),
    (lambda: interchange.from_py4dstem({"A1": 1}), "'A1' is no aberration that py4DSTEM knows"),
]


@pytest.mark.parametrize("call, message", WRONG_NAMES)
def test_names_that_are_not_known(call, message):
    with pytest.raises(InputError, match=message):
        call()


def saved(path, tree):
    with open(path, "w") as file:
        json.dump(tree, file) if path.suffix == ".json" else YAML().dump(tree, file)
    return path


def ptyrad_tree(**init: Any) -> dict[str, Any]:
    known = {
        "probe_kv": 80, "probe_conv_angle": 24.9, "probe_aberrations": {"C10": 200},
        "meas_Npix": 8, "pos_N_scan_slow": 3, "pos_N_scan_fast": 5, "pos_scan_step_size": 0.43,
        "probe_pmode_max": 6, "obj_Nlayer": 6, "obj_slice_thickness": 2, "meas_flipT": None,
        "pos_scan_affine": None, "meas_params": {"path": "data/scan.raw", "key": None},
    }  # fmt: skip
    losses = {"loss_single": {"state": True}, "loss_poissn": {"state": False}}
    return {"init_params": known | init, "loss_params": losses, "recon_params": {"NITER": 40}}


def phaser_tree(**raw: Any) -> dict[str, Any]:
    known = {"type": "manual", "path": "scan.h5", "key": "data", "kv": 80, "diff_step": 1.2}
    probe = {"type": "focused", "conv_angle": 25, "defocus": 200,
             "aberrations": [{"A1": {"mag": 3, "angle": 90}}]}  # fmt: skip
    scan = {"type": "raster", "shape": [3, 5], "step_size": [0.5, 0.4], "rotation": 30}
    engine = {"type": "gradient", "niter": 20, "probe_modes": 4, "noise_model": {"type": "poisson"}}
    return {
        "name": "wide", "raw_data": known | raw, "init": {"probe": probe, "scan": scan},
        "slices": {"n": 4, "total_thickness": 60}, "engines": [engine | {"niter": 5}, engine],
    }  # fmt: skip


def test_parameters_of_ptyrad(tmp_path):
    flags = {"meas_crop": [None, None, [0, 8], [0, 8]], "obj_omode_max": 2}
    tilt = {"tilt_source": "simu", "tilt_params": {"tilt_type": "all", "init_tilts": [[1, -2]]}}
    found = interchange.read_recipe(saved(tmp_path / "run.yaml", ptyrad_tree(**flags, **tilt)))
    assert found.experiment == {
        "title": "run",
        "beam": {"energy_ev": 80e3, "semiangle_mrad": 24.9, "aberrations": {}},
        "scans": [{"file": "data/scan.raw", "scan_shape": [3, 5], "defocus": -200}],
        "geometry": {"scan_step": [0.43, 0.43], "rotation_deg": 0, "transpose": False},
        "method": {"name": "multislice", "loss": "amplitude", "iterations": 40},
        "sections": {"start": 0, "stop": 12},
    }
    np.testing.assert_array_equal(found.thicknesses, np.full(6, 2.0))
    assert (found.probes, found.objects, found.tilt) == (6, 2, (-1, 2))
    assert found.notes == ("PtyRAD crops the frames (meas_crop)",)
    from_mapping(found.experiment)


def test_a_plan_of_phaser(tmp_path):
    tree = phaser_tree()
    tree["init"]["tilt"] = {"type": "global", "tilt": [1, -2]}
    found = interchange.read_recipe(saved(tmp_path / "plan.yaml", tree))
    beam = found.experiment["beam"]
    assert beam.pop("aberrations") == pytest.approx({"C12": 3, "phi12": np.pi / 4})
    assert found.experiment == {
        "title": "wide",
        "beam": {"energy_ev": 80e3, "semiangle_mrad": 25},
        "scans": [
            {"file": "scan.h5", "dataset": "data", "scan_shape": [3, 5], "defocus": -200}
        ],
        "geometry": {
            "scan_step": pytest.approx([0.5, 0.4]), "rotation_deg": pytest.approx(-30),
            "transpose": False, "detector_pixel_mrad": 1.2,
        },
        "method": {"name": "multislice", "loss": "poisson", "iterations": 25},
        "sections": {"start": 0, "stop": 60},
    }  # fmt: skip
    np.testing.assert_array_equal(found.thicknesses, np.full(4, 15.0))
    assert (found.probes, found.tilt, found.band_limit) == (4, (-1, 2), 2 / 3)
    from_mapping(found.experiment)


@pytest.mark.parametrize(
    "slices, wanted",
    [(None, [0]), ({"thicknesses": [3, 4]}, [3, 4]), ({"n": 2, "slice_thickness": 5}, [5, 5])],
)
def test_slices_of_phaser(tmp_path, slices, wanted):
    tree = phaser_tree()
    tree["slices"] = {"n": 9, "slice_thickness": 1}
    tree["engines"][-1] = tree["engines"][-1] | {"slices": slices, "bwlim_frac": None}
    if slices is None:
        tree["slices"] = None
    found = interchange.read_recipe(saved(tmp_path / "plan.json", tree))
    np.testing.assert_array_equal(found.thicknesses, wanted)
    assert found.experiment["method"]["name"] == ("multislice" if slices else "singleslice")
    assert found.band_limit is None


def turned(frame, flips):
    """As all packages flip: rows, columns, then the transposition."""
    frame = np.flip(frame, tuple(axis for axis in (0, 1) if flips[axis]))
    return frame.T if flips[2] else frame


def on_the_detector(positions, flips, middle, shape):
    """Where a spot at each place about `middle` of a file's frame lies about n//2 after flips."""
    found = []
    for position in positions:
        frame = np.zeros(shape)
        frame[tuple(np.rint(np.add(middle, position)).astype(int))] = 1
        frame = turned(frame, flips)
        found.append(np.argwhere(frame)[0] - np.array(frame.shape) // 2)
    return np.array(found)


FLIPS = [*itertools.product([0, 1], repeat=3)]
RASTER = np.indices((3, 5)).reshape(2, -1).T.astype(float)


def compare(found, flips, wanted, shape=(40, 40), tolerance=1e-9):
    """Our raster in the file's frame, seen after the flips, with the positions of the package."""
    known = found.experiment["geometry"]
    step = tuple(known["scan_step"])
    turn = np.deg2rad(known["rotation_deg"])
    places = sj.raster((3, 5), step, turn, known["transpose"])
    middle = known.get("center") or [n // 2 for n in shape]
    whole = np.rint(places).astype(int)
    assert np.ptp(whole, axis=0).min() > 1
    matrix = np.linalg.lstsq(whole, on_the_detector(whole, flips, middle, shape), rcond=None)[0]
    seen = on_the_detector(whole, flips, middle, shape)
    np.testing.assert_allclose(whole @ matrix, seen, atol=1e-9)
    np.testing.assert_allclose(places @ matrix, wanted - wanted[0], atol=tolerance)


@pytest.mark.parametrize("flips", FLIPS)
@pytest.mark.parametrize("scan_flips", [None, (1, 0, 0), (0, 1, 1), (0, 0, 1)])
def test_orientations_of_ptyrad(tmp_path, flips, scan_flips):
    angle, scale = 25.0, 1.5
    tree = ptyrad_tree(
        meas_Npix=40, meas_flipT=[*flips], pos_scan_step_size=2.0,
        pos_scan_affine=[scale, 0, angle, 0],
        pos_scan_flipT=None if scan_flips is None else [*scan_flips],
    )  # fmt: skip
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    positions = 2.0 * RASTER
    positions = positions - positions.mean(0)
    if scan_flips is not None:
        axes = tuple(axis for axis in range(3) if scan_flips[axis])
        positions = np.flip(positions.reshape(3, 5, 2), axes).reshape(-1, 2)
    positions = positions @ (scale * np.array([[cos, sin], [-sin, cos]]))
    found = interchange.read_recipe(saved(tmp_path / "run.yaml", tree))
    assert found.notes == ()
    compare(found, flips, positions)


@pytest.mark.parametrize("flips", FLIPS)
def test_orientations_of_phaser(tmp_path, flips):
    shape = (40, 46)
    tree = phaser_tree(
        det_flips=[bool(f) for f in flips], det_shape=list(shape[::-1] if flips[2] else shape)
    )
    tree["init"]["scan"] |= {"step_size": [2.5, 2.0], "rotation": 40}
    cos, sin = np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40))
    positions = RASTER * [2.5, 2.0] @ np.array([[cos, -sin], [sin, cos]]).T
    found = interchange.read_recipe(saved(tmp_path / "plan.yaml", tree))
    compare(found, flips, positions, shape)


@pytest.mark.parametrize("flips", FLIPS)
def test_aberrations_are_seen_on_the_detector_of_the_file(tmp_path, x64, flips):
    values = numbers()
    named = {f"C{o}": c for o, (c, _) in values.items()}
    named |= {f"phi{o}": float(np.degrees(p)) for o, (_, p) in values.items() if o[1] != "0"}
    tree = ptyrad_tree(meas_flipT=[*flips], probe_aberrations=named)
    found = interchange.read_recipe(saved(tmp_path / "run.yaml", tree)).experiment
    seen = {"C10": -found["scans"][0]["defocus"], **found["beam"]["aberrations"]}
    chi = lambda coefficients, ky, kx: np.asarray(
        aberration_phase(
            {k: jnp.asarray([v]) for k, v in cartesian(coefficients).items()},
            jnp.asarray(ky), jnp.asarray(kx), 80e3,
        )
    )[0]  # fmt: skip
    ky, kx = np.meshgrid(np.linspace(-0.5, 0.5, 9), np.linspace(-0.5, 0.5, 9), indexing="ij")
    before, after = chi(seen, ky, kx), chi(interchange.from_ptyrad(named), ky, kx)
    np.testing.assert_allclose(turned(before, flips), after, rtol=1e-9, atol=1e-9)


CALIBRATIONS = {"dx": 0.2, "dk": 0.05, "kMax": 2.0, "da": 1.5, "angleMax": 60, "RBF": 12,
                "n_alpha": 3}  # fmt: skip


@pytest.mark.parametrize("mode", CALIBRATIONS)
def test_calibrations_of_ptyrad(tmp_path, mode):
    value, lam, n = CALIBRATIONS[mode], wavelength(80e3) * 1e3, 8
    given = {"mode": mode, "value": value}
    tree = ptyrad_tree(meas_calibration=given)
    found = interchange.read_recipe(saved(tmp_path / "run.yaml", tree)).experiment
    pixel = {"dx": lam / n / 0.2, "dk": lam * 0.05, "kMax": lam * 4 / n, "da": 1.5,
             "angleMax": 120 / n, "RBF": 24.9 / 12, "n_alpha": 6 * 24.9 / n}  # fmt: skip
    assert found["geometry"]["detector_pixel_mrad"] == pytest.approx(pixel[mode])


def test_toml_and_what_is_left_out(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[init_params]\nprobe_kv = 300\nprobe_conv_angle = 21.4\nmeas_Npix = 64\n"
        "pos_N_scan_slow = 3\npos_N_scan_fast = 5\npos_scan_step_size = 0.41\n"
        "pos_scan_affine = [1, 0, 0, 2]\n[init_params.meas_params]\npath = 'a.h5'\n"
    )
    found = interchange.read_recipe(path)
    assert found.experiment["beam"]["energy_ev"] == 300e3
    assert "88.00° apart" in found.notes[0]
    plan = phaser_tree(type="empad", path="meta.json") | {"post_load": [{"type": "poisson"}]}
    notes = interchange.read_recipe(saved(tmp_path / "plan.yaml", plan)).notes
    assert any("meta.json says more" in n for n in notes) and any("post_load" in n for n in notes)


BROKEN = {
    "no energy": (lambda: ptyrad_tree(probe_kv=None), "init_params.probe_kv = None: a number"),
    "text": (lambda: ptyrad_tree(pos_scan_step_size="0.4 A"), "pos_scan_step_size = '0.4 A'"),
    "half": (lambda: ptyrad_tree(obj_Nlayer=2.5), "obj_Nlayer = 2.5: a whole number"),
    "flips": (lambda: ptyrad_tree(meas_flipT=[1, 0]), "meas_flipT = .*: 3 numbers are needed"),
    "lens": (lambda: ptyrad_tree(probe_aberrations={"C99": 1}), "'C99' is no aberration"),
    "file": (lambda: ptyrad_tree(meas_params=None), "init_params.meas_params is missing"),
    "engines": (lambda: phaser_tree() | {"engines": []}, "engines = .*: a list of engines"),
    "type": (lambda: phaser_tree(type=None), "raw_data.type = None: text is needed"),
    "other": (lambda: {"beam": {}}, "has the keys beam; PtyRAD's"),
    "list": (lambda: [1, 2], "holds list, not keys"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parameters_that_are_broken(tmp_path, name):
    make, message = BROKEN[name]
    with pytest.raises(InputError, match=f"run.yaml: .*{message}"):
        interchange.read_recipe(saved(tmp_path / "run.yaml", make()))


def test_files_that_are_no_parameters(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1, 2\n")
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("a.yaml", "a.json", "a.bin", "none.yaml"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as a file of parameters"):
            interchange.read_recipe(tmp_path / name)


def test_polar_numbers_are_the_ones_that_were_meant():
    given = {"C12": 5.0, "phi12": 0.4, "C30": -3.0}
    for name in ("ptyrad", "py4dstem"):
        there, back = (getattr(interchange, f"{way}_{name}") for way in ("to", "from"))
        assert back(there(given)) == pytest.approx(given)
    again = interchange.from_phaser(**interchange.to_phaser(given))
    assert again == pytest.approx(given | {"C10": 0})
    assert polar(cartesian(given))["C12"] == pytest.approx(5)
