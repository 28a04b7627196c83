"""Files that py4DSTEM, phaser and PtyRAD wrote, and files of ours that they read.

Each package reconstructs a few small patterns, saves, and computes what its own forward model
predicts; then it loads what we made of the file, and predicts again. PtyRAD needs torch: it is
tried where SMPR3D_PEERS_PYTHON names a Python that has it.
"""

import dataclasses
import json
import os

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

import smpr3d_jax as sj
from smpr3d_jax import interchange
from smpr3d_jax.physics.fourier import ifft
from smpr3d_jax.physics.optics import spectra

from .foreign import PEERS, python_with, run
from .test_interchange_recipes import compare, phaser_tree, ptyrad_tree, saved


pytestmark = pytest.mark.slow

PACKAGES = {
    "py4dstem": ("py4DSTEM==0.14.18",),
    "phaser": ("phaserEM[jax]==0.3.1", "h5py"),
    "ptyrad": ("ptyrad==1.0.0",),
}


def python_of(peer):
    if peer == "ptyrad" and not os.environ.get(PEERS):
        pytest.skip(f"PtyRAD comes with torch; give {PEERS} a Python that has ptyrad")
    return python_with(*PACKAGES[peer])


PATTERNS = """
    import logging, sys, warnings
    import numpy as np

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    SCAN = 4, 5

    def patterns(shape):
        rng = np.random.default_rng(0)
        rows, columns = (np.arange(n) - n // 2 for n in shape)
        disc = 50 * np.exp(-(rows[:, None] ** 2 + columns**2) / 18.0)
        return (rng.poisson(3.0, (*SCAN, *shape)) + disc).astype(np.float32)
"""
PY4DSTEM = (
    PATTERNS
    + """
    import matplotlib
    matplotlib.use("Agg")
    import py4DSTEM
    from py4DSTEM.process import phase

    def cube_of(frames):
        cube = py4DSTEM.DataCube(frames)
        cube.calibration.set_R_pixel_size(0.45)
        cube.calibration.set_R_pixel_units("A")
        cube.calibration.set_Q_pixel_size(0.11)
        cube.calibration.set_Q_pixel_units("A^-1")
        return cube

    def prepared(r, shape, **how):
        shifts = tuple(np.full(SCAN, float(n // 2)) for n in shape)
        quiet = dict(plot_center_of_mass=False, plot_rotation=False, plot_probe_overlaps=False)
        r.preprocess(force_com_shifts=shifts, **quiet, **how)

    def predicted(r):
        pixels = r._positions_px
        rows, columns = r._extract_vectorized_patch_indices(pixels)
        probes = r._return_shifted_probes(r._probe, pixels - np.round(pixels))
        _, _, waves = r._overlap_projection(r._object, rows, columns, probes)
        frames = np.abs(np.fft.fft2(waves)) ** 2
        return frames.sum(1) if frames.ndim == 4 else frames
"""
)
PY4DSTEM_WRITES = (
    PY4DSTEM
    + """
    kind, file, frames = sys.argv[1:]
    shape = 24, 32
    how = dict(energy=80e3, semiangle_cutoff=25.0, object_type="complex", defocus=40.0, C12=10,
               phi12=0.3, verbose=False, device="cpu", datacube=cube_of(patterns(shape)))
    name = "Ptychography"
    if "slices" in kind:
        how |= dict(num_slices=3, slice_thicknesses=[12.0, 20.0], theta_x=3.0, theta_y=-5.0)
        name = "Multislice" + name
    if "states" in kind:
        how |= dict(num_probes=2)
        name = "Mixedstate" + name
    if "potential" in kind:
        how |= dict(object_type="potential")
    r = getattr(phase, "Singleslice" + name if name == "Ptychography" else name)(**how)
    prepared(r, shape, force_com_rotation=10, force_com_transpose="transpose" in kind)
    r.reconstruct(num_iter=3, reconstruction_method="gradient-descent", step_size=0.5,
                  max_batch_size=5, seed_random=1, fix_positions=False, progress_bar=False,
                  reset=True)
    py4DSTEM.save(file, r, mode="o")
    np.save(frames, predicted(r))
"""
)
PY4DSTEM_READS = (
    PY4DSTEM
    + """
    kind, file, before, after = sys.argv[1:]
    frames = np.load(before)
    r = py4DSTEM.read(file)
    centred = np.fft.fftshift(frames, axes=(-2, -1))
    r.attach_datacube(cube_of(centred.reshape(*SCAN, *frames.shape[-2:]).astype(np.float32)))
    prepared(r, frames.shape[-2:], force_com_rotation=0, force_com_transpose=False,
             center_positions_in_fov=False)
    np.save(after, predicted(r))
    r.reconstruct(num_iter=1, reconstruction_method="gradient-descent", max_batch_size=5,
                  progress_bar=False)
    assert r.error < 1e-9, r.error
"""
)
PHASER = (
    PATTERNS
    + """
    import jax
    import phaser.execute as execute
    from phaser.engines.common.simulation import (
        cutout_group, make_propagators, slice_forwards, tilt_propagators)
    from phaser.observer import Observer
    from phaser.plan import ReconsPlan
    from phaser.state import ReconsState
    from phaser.utils.num import abs2, fft2, ifft2

    class Losses(Observer):
        def update_iteration(self, state, i, n, errors):
            self.last = float(errors["detector_loss"])

    def reconstructed(kind, data, init, modes, niter, rate, slices=None):
        solvers = {"object": {"type": "adam", "learning_rate": 0.05 * rate},
                   "probe": {"type": "adam", "learning_rate": 0.5 * rate}}
        if rate:
            solvers["positions"] = {"type": "sgd", "learning_rate": 0.5}
            if "tilts" in kind:
                solvers["tilt"] = {"type": "adam", "learning_rate": 0.3}
        engine = {"type": "gradient", "probe_modes": modes, "niter": niter, "grouping": 5,
                  "bwlim_frac": None if "unlimited" in kind else 2 / 3,
                  "noise_model": {"type": "poisson"}, "solvers": solvers, "regularizers": [],
                  "group_constraints": [], "iter_constraints": [], "update_positions": bool(rate),
                  "update_tilt": "tilts" in kind and bool(rate)}
        raw = {"type": "manual", "path": data, "kv": 80.0, "diff_step": 4.6, "adu": 1.0}
        plan = ReconsPlan.from_data({"name": "x", "backend": "jax", "raw_data": raw, "init": init,
                                     "slices": slices, "engines": [engine]})
        watch = Losses()
        begun = execute.initialize_reconstruction(plan, override_observers=watch)
        return execute.execute_engine(begun, plan.engines[0]).state, watch

    def predicted(kind, state):
        state = state.to_numpy()
        shape = state.scan.data.shape[:-1]
        group = np.array(np.unravel_index(np.arange(np.prod(shape)), shape))
        ky, kx = state.probe.sampling.recip_grid(dtype=np.float64)
        probes, planes, _ = cutout_group(ky, kx, state, group)
        steps = make_propagators(state, None if "unlimited" in kind else 2 / 3)
        tilts = None if state.scan.tilt is None else state.scan.tilt[tuple(group)]

        def cross(i, step, wave):
            wave = wave * planes[:, i, None]
            return wave if step is None else ifft2(fft2(wave) * step[:, None])

        steps = tilt_propagators(ky, kx, state, steps, tilts)
        return abs2(fft2(slice_forwards(steps, probes, cross))).sum(1)
"""
)
PHASER_WRITES = (
    PHASER
    + """
    kind, file, frames = sys.argv[1:]
    data = frames + ".data.npy"
    np.save(data, patterns((24, 31 if "odd" in kind else 32)))
    probe = {"type": "focused", "conv_angle": 25.0, "defocus": -40.0,
             "aberrations": [{"C1": 5.0, "B2": {"re": 300, "im": 200}}]}
    scan = {"type": "raster", "shape": list(SCAN), "step_size": [0.45, 0.55], "rotation": 10.0}
    init = {"probe": probe, "scan": scan, "object": "random"}
    if "global" in kind:
        init["tilt"] = {"type": "global", "tilt": [3.0, -5.0]}
    slices = {"thicknesses": [12.0, 20.0, 7.0]} if "slices" in kind else None
    state, _ = reconstructed(kind, data, init, 1 + ("states" in kind), 3, 1.0, slices)
    state.write_hdf5(file)
    np.save(frames, predicted(kind, state))
"""
)
PHASER_READS = (
    PHASER
    + """
    kind, file, before, after = sys.argv[1:]
    frames = np.load(before)
    state = ReconsState.read_hdf5(file)
    np.save(after, predicted(kind, state))
    data = after + ".data.npy"
    centred = np.fft.fftshift(frames, axes=(-2, -1)).reshape(*SCAN, *frames.shape[-2:])
    np.save(data, centred.astype(np.float32))
    _, watch = reconstructed(kind, data, {"state": file}, len(state.probe.data), 1, 0.0)
    # What is left is its 1e-3 for each pixel.
    assert watch.last < 1.05e-3 * frames[0].size, watch.last
"""
)
PTYRAD = (
    PATTERNS
    + """
    import torch

    # A torchvision for CUDA registers these on a CPU only if they are declared.
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            declared.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            pass
    import matplotlib
    matplotlib.use("Agg")
    from ptyrad.core.models import PtychoModel
    from ptyrad.params.ptyrad_params import PtyRADParams
    from ptyrad.runtime.device import set_gpu_device
    from ptyrad.solver import PtyRADSolver

    def solver_of(folder, init, rates):
        moves = {name: {"start_iter": 1 if rate else None, "lr": rate}
                 for name, rate in rates.items()}
        scan = {"pos_N_scan_slow": SCAN[0], "pos_N_scan_fast": SCAN[1], "pos_N_scans": 20}
        params = PtyRADParams(
            init_params={"probe_kv": 80.0, "probe_conv_angle": 25.0, "meas_Npix": 32,
                         "pos_scan_step_size": 0.5, "meas_source": "file", **scan, **init},
            model_params={"update_params": moves},
            loss_params={"loss_single": {"state": True, "weight": 1.0, "dp_pow": 0.5},
                         "loss_sparse": {"state": False}},
            recon_params={"NITER": 4, "BATCH_SIZE": {"size": 5, "grad_accumulation": 1},
                          "SAVE_ITERS": 4, "output_dir": folder, "copy_params": False,
                          "save_result": ["model"], "selected_figs": []}).model_dump()
        return PtyRADSolver(params, device=set_gpu_device("cpu"), seed=0), params

    def predicted(model):
        with torch.no_grad():
            return np.fft.ifftshift(model(np.arange(20)).numpy(), axes=(-2, -1))
"""
)
PTYRAD_WRITES = (
    PTYRAD
    + """
    import glob, os

    kind, file, frames = sys.argv[1:]
    np.save(frames + ".data.npy", patterns((32, 32)).reshape(-1, 32, 32))
    each = "each" in kind
    init = {"probe_aberrations": {"defocus": 40.0, "A1": 20.0, "A1phi": 15.0, "C21": 500,
                                  "phi21": 30},
            "probe_pmode_max": 2 if "states" in kind else 1,
            "obj_Nlayer": 3 if "slices" in kind else 1, "obj_slice_thickness": 4.0,
            "obj_omode_max": 2 if "objects" in kind else 1,
            "meas_calibration": {"mode": "dk", "value": 0.11}, "pos_scan_rand_std": 0.15,
            "meas_params": {"path": frames + ".data.npy"}, "probe_source": "simu",
            "pos_source": "simu", "obj_source": "simu", "tilt_source": "simu",
            "tilt_params": {"tilt_type": "each" if each else "all",
                            "init_tilts": [[3.0, -5.0]] if "tilt" in kind else [[0, 0]]}}
    if "objects" in kind:
        init["obj_omode_init_occu"] = {"occu_type": "custom", "init_occu": [0.7, 0.3]}
    rates = {"obja": 1e-2, "objp": 5e-2, "obj_tilts": 0.1 * each, "probe": 1e-2,
             "slice_thickness": 0.2 * ("thickness" in kind), "probe_pos_shifts": 2e-2}
    solver, _ = solver_of(frames + ".out", init, rates)
    solver.reconstruct()
    np.save(frames, predicted(solver.reconstruct_results))
    saved = [f for f in glob.glob(frames + ".out/**/*.h*5", recursive=True) if "model" in f]
    os.replace(saved[0], file)
"""
)
PTYRAD_READS = (
    PTYRAD
    + """
    import h5py

    kind, file, before, after = sys.argv[1:]
    frames = np.load(before)
    np.save(after + ".data.npy", np.fft.fftshift(frames, axes=(-2, -1)))
    with h5py.File(file) as f:
        objects, slices = f["optimizable_tensors/objp"].shape[:2]
        states = len(f["optimizable_tensors/probe"])
        pixel = float(f["model_attributes/dx"][()])
        thickness = float(f["model_attributes/slice_thickness"][()])
        shares = f["model_attributes/omode_occu"][()].tolist()
        total = float((abs(f["optimizable_tensors/probe"][()]) ** 2).sum())
    init = {"probe_pmode_max": states, "obj_Nlayer": slices, "obj_slice_thickness": thickness,
            "obj_omode_max": objects, "pos_scan_rand_std": None,
            "obj_omode_init_occu": {"occu_type": "custom", "init_occu": shares},
            "meas_calibration": {"mode": "dx", "value": pixel},
            "meas_params": {"path": after + ".data.npy"},
            "meas_normalization": {"mode": "divide_const", "value": 1.0},
            "probe_source": "PtyRAD", "pos_source": "PtyRAD", "obj_source": "PtyRAD",
            "tilt_source": "PtyRAD", "probe_params": file, "pos_params": file,
            "obj_params": file, "tilt_params": file}
    rates = {"obja": 1e-9, "objp": 1e-9, "obj_tilts": 0, "slice_thickness": 0, "probe": 1e-9,
             "probe_pos_shifts": 0}
    solver, params = solver_of(after + ".out", init, rates)
    model = PtychoModel(solver.init.init_variables, params["model_params"], device="cpu")
    # PtyRAD normalises every probe that it loads.
    scale = total / float((model.get_complex_probe_view().abs() ** 2).sum())
    np.save(after, predicted(model) * scale)
"""
)
SCRIPTS = {
    "py4dstem": (PY4DSTEM_WRITES, PY4DSTEM_READS),
    "phaser": (PHASER_WRITES, PHASER_READS),
    "ptyrad": (PTYRAD_WRITES, PTYRAD_READS),
}
KINDS = {
    "py4dstem": ["plain", "slices", "states", "slices states transpose", "slices potential"],
    "phaser": ["plain", "slices states", "slices global", "slices tilts unlimited", "slices odd"],
    "ptyrad": ["plain", "slices states tilt", "slices objects each", "slices thickness"],
}


def agreeing(peer, file, found, wanted):
    """Relative differences of the frames, and the frames that should agree.

    PtyRAD leaves a window where it was when its probe has gone half a pixel and more.
    """
    difference = np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    if peer != "ptyrad":
        return difference
    with h5py.File(file) as f:
        shifts = np.asarray(f["optimizable_tensors/probe_pos_shifts"])  # pyright: ignore
    near = np.all(np.abs(shifts) < 0.5, axis=1)
    assert near.sum() >= 10
    return difference[near]


@pytest.mark.parametrize("peer, kind", [(p, k) for p, kinds in KINDS.items() for k in kinds])
def test_there_and_back(tmp_path, peer, kind):
    python, (writes, reads) = python_of(peer), SCRIPTS[peer]
    file, frames = tmp_path / "theirs.h5", tmp_path / "frames.npy"
    run(python, writes, kind, file, frames)
    one = interchange.read(file)
    wanted = np.load(frames)
    assert (len(one), one.transmission.shape[1]) == (20, 3 if "slices" in kind else 1)
    assert len(one.probes) == (2 if "states" in kind else 1)
    assert one.energy == pytest.approx(80e3, rel=1e-5)
    limit = 2 / 3 if peer == "phaser" and "unlimited" not in kind else None
    found = interchange.patterns(dataclasses.replace(one, band_limit=limit))
    # PtyRAD propagates with the square root instead of its parabola.
    most = 5e-4 if peer == "ptyrad" and "slices" in kind else 2e-6
    assert np.all(agreeing(peer, file, found, wanted) < most)
    interchange.write(tmp_path / "ours.h5", one, peer)
    run(python, reads, kind, tmp_path / "ours.h5", frames, tmp_path / "again.npy")
    again = np.load(tmp_path / "again.npy")
    assert np.all(agreeing(peer, file, again, wanted) < 5e-6)


NUMBERS = """
    import json, sys
    import numpy as np

    rng = np.random.default_rng(3)
    n, pixel, semiangle = 96, 0.12, 30.0
    size = {"1": 60, "2": 1500, "3": 4e4, "4": 1e6, "5": 3e7}
    orders = "12 21 23 30 32 34 41 43 45 50 52 54 56".split()
    magnitude = lambda order: float(rng.uniform(0.3, 1) * size[order[0]])
"""
PROBES = {
    "ptyrad": NUMBERS + """
    from ptyrad.optics.probe import make_stem_probe

    first = {"defocus": 40.0} | {f"C{o}": magnitude(o) for o in orders}
    first |= {f"phi{o}": float(rng.uniform(0, 360)) for o in orders if o[1] != "0"}
    haider = dict(C1=60, A1=60, B2=400, A2=1500, C3=4e4, S3=1e4, A3=4e4, B4=2e5, D4=2e5, A4=1e6,
                  C5=3e7, S5=5e6, R5=5e6, A5=3e7)
    second = {name: float(rng.uniform(0.3, 1) * s) for name, s in haider.items()}
    second |= {f"{k}phi": float(rng.uniform(0, 90)) for k in haider if k[0] != "C"}
    third = {"C10": -30.0, "Cs": 2e4}
    for o in orders:
        if o[1] != "0":
            third |= {f"C{o}{part}": float(rng.normal() * magnitude(o) / 2) for part in "ab"}
    sets = [first, second, third]
    probes = [make_stem_probe(80.0, semiangle, n, pixel, s) for s in sets]
    """,
    "phaser": NUMBERS + """
    import pane
    from phaser.hooks import FocusedProbeProps
    from phaser.utils.num import Sampling
    from phaser.utils.optics import make_focused_probe
    from phaser.utils.physics import Electron

    first = [{"n": int(o[0]), "m": int(o[1]), "mag": magnitude(o),
              "angle": float(rng.uniform(0, 360) if o[1] != "0" else 0)} for o in orders]
    haider = dict(c1=60, a1=60, B2=400, a2=1500, c3=4e4, s3=1e4, a3=4e4, b4=2e5, d4=2e5, a4=1e6,
                  c5=3e7)
    second = [{k: {"re": float(rng.normal() * s / 2),
                   "im": float(rng.normal() * s / 2) if k[0] != "c" else 0.0}}
              for k, s in haider.items()]
    sets = [{"defocus": 40.0, "aberrations": first}, {"defocus": -20.0, "aberrations": second}]
    ky, kx = Sampling((n, n), sampling=(pixel, pixel)).recip_grid()
    probes = []
    for s in sets:
        lens = pane.from_data(dict(conv_angle=semiangle, **s), FocusedProbeProps)
        probes.append(make_focused_probe(ky, kx, Electron(80e3).wavelength, semiangle,
                                         defocus=lens.defocus, aberrations=lens.aberrations))
    """,
    "py4dstem": NUMBERS + """
    from py4DSTEM.process.phase.utils import ComplexProbe

    first = {"C10": -40.0} | {f"C{o}": magnitude(o) for o in orders}
    first |= {f"phi{o}": float(rng.uniform(0, 6)) for o in orders if o[1] != "0"}
    second = dict(defocus=30.0, astigmatism=40.0, astigmatism_angle=0.4, coma=900.0,
                  coma_angle=1.1, Cs=3e4, C5=1e7)
    sets = [first, second]
    make = lambda s: ComplexProbe(80e3, (n, n), (pixel, pixel), semiangle_cutoff=semiangle,
                                  rolloff=0.0, parameters=dict(s)).build()._array
    probes = [np.fft.fftshift(make(s)) for s in sets]
    """,
}  # fmt: skip
SAVE = """
    np.save(sys.argv[1], np.array(probes))
    print(json.dumps(sets))
"""


@pytest.mark.parametrize("peer", PROBES)
def test_probes_with_every_aberration(tmp_path, x64, peer):
    said = run(python_of(peer), PROBES[peer] + SAVE, tmp_path / "probes.npy")
    probes = np.load(tmp_path / "probes.npy")
    grid = sj.Grid((96, 96), (0.12, 0.12))
    for given, theirs in zip(json.loads(said.splitlines()[-1]), probes, strict=True):
        into = getattr(interchange, f"from_{peer}")
        ours = into(**given) if peer == "phaser" else into(given)
        optics = sj.focal_series(80e3, 30.0, [0.0], ours)
        wave = np.asarray(jnp.fft.fftshift(ifft(spectra(optics, grid, float, soft=False))[0, 0]))
        overlap = abs(np.vdot(wave, theirs)) / np.linalg.norm(wave) / np.linalg.norm(theirs)
        assert overlap > 1 - 1e-6
        back = getattr(interchange, f"to_{peer}")(ours)
        again = into(**back) if peer == "phaser" else into(back)
        assert again == pytest.approx(ours)


PLACES = {
    "ptyrad": PTYRAD
    + """
    from ptyrad.init.initializer import Initializer
    from ptyrad.params.parser import load_params

    file, places = sys.argv[1:]
    begun = Initializer(load_params(file)["init_params"], seed=0)
    begun.init_all()
    known = begun.init_variables
    np.save(places, (known["crop_pos"] + known["probe_pos_shifts"]) * known["dx"])
    """,
    "phaser": PATTERNS
    + """
    import yaml
    import jax
    from phaser.execute import initialize_reconstruction
    from phaser.observer import Observer
    from phaser.plan import ReconsPlan

    file, places = sys.argv[1:]
    plan = ReconsPlan.from_data(yaml.safe_load(open(file)))
    state = initialize_reconstruction(plan, override_observers=Observer()).state
    np.save(places, np.asarray(state.scan.data).reshape(-1, 2))
    """,
}


@pytest.mark.parametrize("peer, flips", [(p, f) for p in PLACES for f in [(1, 0, 0), (0, 1, 1)]])
def test_positions_of_recipes(tmp_path, peer, flips):
    data = tmp_path / "data.npy"
    frames = np.random.default_rng(0).poisson(9.0, (15, 40, 40)).astype(np.float32)
    np.save(data, frames if peer == "ptyrad" else frames.reshape(3, 5, 40, 40))
    if peer == "ptyrad":
        tree = ptyrad_tree(
            meas_Npix=40, meas_params={"path": str(data)}, meas_flipT=[*flips],
            pos_scan_step_size=2.0, pos_scan_affine=[1.5, 0, 25, 0], pos_scan_flipT=[0, 1, 1],
            meas_calibration={"mode": "dx", "value": 0.2}, pos_scan_rand_std=None, pos_N_scans=15,
        )  # fmt: skip
        del tree["loss_params"]
    else:
        tree = phaser_tree(path=str(data), det_flips=[bool(f) for f in flips], det_shape=[40, 40])
        tree["init"]["scan"] |= {"step_size": [2.5, 2.0]}
        del tree["raw_data"]["key"]
        solvers = {"object": {"type": "adam", "learning_rate": 0.1}}
        none = {"regularizers": [], "group_constraints": [], "iter_constraints": []}
        tree["engines"] = [one | none | {"solvers": solvers} for one in tree["engines"]]
    file = saved(tmp_path / "run.yaml", tree)
    run(python_of(peer), PLACES[peer], file, tmp_path / "places.npy")
    found = interchange.read_recipe(file)
    compare(found, flips, np.load(tmp_path / "places.npy"), tolerance=1e-4)
