"""Reconstructions as py4DSTEM 0.14.18, phaserEM 0.3.1 and PtyRAD 1.0.0 lay them out in HDF5.

The names, types and shapes were read off files that these packages wrote; the slow tests read such
files anew. The numbers are made up, in the conventions of each package, from one `scene` in ours.
"""

import json
from typing import Any

import numpy as np

from smpr3d_jax.data.interchange import Exchange
from smpr3d_jax.physics.optics import wavelength

from .scan_files import opened


SCAN = (2, 3)


def scene(
    window: Any = (10, 14), objects: Any = 1, slices: Any = 3, probes: Any = 2, tilts: Any = 1,
    seed: Any = 0, **changes: Any,
):  # fmt: skip
    """A made-up reconstruction in our conventions, with every window on the object."""
    rng = np.random.default_rng(seed)
    sampling = (0.25, 0.25) if window[0] == window[1] else (0.3, 0.2)
    middle = np.array(window) // 2
    y, x = np.indices(SCAN).reshape(2, -1)
    pixels = np.stack([2.3 * y, 1.7 * x], 1) + rng.uniform(-0.3, 0.3, (6, 2)) + middle + 1
    field = np.ceil(pixels.max(0)).astype(int) + middle + 2
    shape = (objects, slices, *field)
    planes = rng.uniform(0.8, 1.0, shape) * np.exp(1j * rng.normal(0, 0.4, shape))
    rows, columns = (np.indices(window).T / middle - 1).T
    fade = np.exp(-(rows**2) - columns**2)
    waves = rng.normal(size=(probes, *window)) + 1j * rng.normal(size=(probes, *window))
    positions = pixels * sampling
    known: dict[str, Any] = {
        "energy": 80e3, "sampling": sampling, "transmission": planes,
        "thicknesses": np.array([12.0, 20.0, 7.0])[:slices],
        "origin": tuple(float(v) for v in -positions[0]), "probes": 5 * waves * fade,
        "positions": positions - positions[0], "weights": np.array([0.6, 0.4])[:objects],
        "tilts": rng.uniform(-8, 8, (tilts, 2)), "scan_shape": SCAN, "semiangle": 25.0,
        "aberrations": {"C10": -40.0, "C12": 15.0, "phi12": 0.3, "C21": 500.0, "phi21": 1.0},
        "losses": {"loss": np.array([3.0, 2.0, 1.5])},
    }  # fmt: skip
    if objects == 1:
        known["weights"] = np.ones(1)
    return Exchange(**known | changes)


def like_py4dstem(path, one, kind="complex", **changes: Any):
    """What `MultislicePtychography` and its kin save; `changes` replace entries by name."""
    states, slices = len(one.probes), one.transmission.shape[1]
    name = ("Mixedstate" if states > 1 else "") + ("Multislice" if slices > 1 else "")
    name = (name or "Singleslice") + "Ptychography"
    window, sampling = np.array(one.probes.shape[1:]), np.array(one.sampling)
    pixels = (one.positions - one.origin) / sampling
    waves = np.fft.ifftshift(one.probes, axes=(-2, -1)) / np.sqrt(window.prod())
    planes = one.transmission[0] if kind == "complex" else np.angle(one.transmission[0])
    tilt = one.tilts[0]
    known = {
        "energy": 80e3, "semiangle_cutoff": one.semiangle, "object_type": kind,
        "num_slices": slices, "slice_thicknesses": one.thicknesses[:-1], "theta_x": tilt[0],
        "theta_y": tilt[1], "vacuum_probe_intensity": "_None", "verbose": False,
    }  # fmt: skip
    lens = {"C10": -40.0, "C12": 15, "phi12": np.pi / 2 - 0.3, "C21": 500.0, "C30": 0.0}
    tables = {
        "instantiation_metadata": known,
        "preprocess_metadata": {
            "positions_px": pixels.astype(np.float32), "sampling": sampling,
            "angular_sampling": wavelength(80e3) * 1e3 / window / sampling,
            "amplitudes_shape": window, "region_of_interest_shape": window,
            "rotation_angle_rad": 0.1, "data_transpose": True, "positions_mask": "_None",
        },
        "reconstruction_metadata": {"reconstruction_error": one.losses["loss"]},
        "aberrations_metadata": lens | {"phi21": np.pi / 2 - 1.0},
    }  # fmt: skip
    with opened(path, "w") as file:
        file.attrs["emd_group_type"] = "file"
        root = file.create_group("my run_root")
        root.attrs["python_class"] = "Root"
        group = root.create_group("my run")
        group.attrs["python_class"] = changes.pop("python_class", name)
        group["_object_emd/data"] = planes if slices > 1 else planes[0]
        group["_probe_emd/data"] = waves if states > 1 else waves[0]
        for title, entries in tables.items():
            for key, value in entries.items():
                group[f"metadatabundle/{title}/{key}"] = changes.get(key, value)


def like_phaser(path, one, version="0.2", frame=(3.0, -2.0)):
    """A state whose positions are counted from anywhere, here `frame` from ours."""
    window, sampling = np.array(one.probes.shape[1:]), np.array(one.sampling)
    half = np.where(window % 2, 0.0, 0.5) * sampling
    scan = (one.positions + frame - half).reshape(*SCAN, 2)
    tilts = np.broadcast_to(-one.tilts, one.positions.shape).reshape(*SCAN, 2)
    slices = one.transmission.shape[1]
    with opened(path, "w") as file:
        file["type"], file["version"] = "phaser_state", version
        file["wavelength"] = wavelength(80e3)
        file["probe/type"] = file["object/type"] = "pixelated"
        file["probe/data"] = one.probes
        file["probe/sampling"], file["probe/extent"] = sampling, sampling * window
        file["object/data"] = one.transmission[0]
        file["object/thicknesses"] = one.thicknesses if slices > 1 else np.zeros(0)
        file["object/sampling"], file["object/corner"] = sampling, np.add(one.origin, frame)
        if version == "0.1":
            file["scan"], file["tilt"] = scan, tilts
            file["progress/iters"] = np.arange(1, 4)
            file["progress/detector_errors"] = one.losses["loss"]
        else:
            file["scan/data"], file["scan/initial"], file["scan/tilt"] = scan, scan, tilts
            file["scan/meta"] = json.dumps({"type": "raster"})
            file["progress/loss/iters"] = np.arange(1, 4)
            file["progress/loss/values"] = one.losses["loss"]
        file["iter/total_iter"] = np.uint64(3)


def like_ptyrad(path, one, off=0.0, **changes: Any):
    """A model; `off` moves the propagator's grid by that part of a pixel, as before 1.0."""
    n, pixel = one.probes.shape[-1], one.sampling[0]
    corners = (one.positions - one.origin) / pixel - n // 2
    whole = np.rint(corners).astype(np.int32)
    lam, k = wavelength(80e3), (np.fft.fftfreq(n) + off / n) / pixel
    # The grid was made around the middle, and shifted afterwards.
    kernel = np.exp(2j * np.pi * 12.0 * np.sqrt(lam**-2 - k[:, None] ** 2 - k**2))
    entries: dict[str, Any] = {
        "optimizable_tensors/obja": np.abs(one.transmission).astype(np.float32),
        "optimizable_tensors/objp": np.angle(one.transmission).astype(np.float32),
        "optimizable_tensors/probe": one.probes.astype(np.complex64),
        "optimizable_tensors/obj_tilts": (-one.tilts).astype(np.float32),
        "optimizable_tensors/probe_pos_shifts": (corners - whole).astype(np.float32),
        "optimizable_tensors/slice_thickness": np.float32(12.0),
        "model_attributes/crop_pos": whole, "model_attributes/dx": np.float32(pixel),
        "model_attributes/omode_occu": one.weights.astype(np.float32),
        "model_attributes/lambd": np.float32(lam), "model_attributes/H": kernel.astype("c8"),
        "model_attributes/slice_thickness": np.float32(12.0),
        "model_attributes/N_scan_slow": SCAN[0], "model_attributes/N_scan_fast": SCAN[1],
        "model_attributes/detector_blur_std": "__NONE__",
        "model_attributes/simu_match_mode": "__NONE__",
        "params/init_params/probe_kv": 80.0, "params/init_params/probe_conv_angle": 25.0,
        "params/init_params/probe_illum_type": "electron",
        "params/init_params/probe_aberrations/defocus": 40.0,
        "params/init_params/probe_aberrations/A1": 15.0,
        "params/init_params/probe_aberrations/A1phi": np.degrees(0.3),
        "params/init_params/probe_aberrations/B2": 500 / 3,
        "params/init_params/probe_aberrations/B2phi": np.degrees(1.0),
        "loss_iters": np.stack([[1, 2, 3], one.losses["loss"]], axis=1),
        "niter": 3, "ptyrad_version": "1.0.0",
    }  # fmt: skip
    with opened(path, "w") as file:
        for key, value in (entries | changes).items():
            if value is not None:
                file[key] = value
