"""Small scans in the formats that keep them in a tree of groups: HDF5 and zarr."""

import shutil
import zipfile
from typing import Any

import hdf5plugin
import numpy as np
import zarr

from .scan_files import flat, FRAME, opened, some_cube


MASKED = ((1, 2), (3, 0))


def the_mask():
    """A pixel mask as a detector has it: not zero where a pixel is unusable."""
    mask = np.zeros(FRAME, np.uint32)
    mask[MASKED[0]], mask[MASKED[1]] = 1, 8
    return mask


def save_dectris(path, cube, split=(4, 9), triggers=None, external=True, mask=True):
    """The older layout: numbered stacks of frames, split where told, behind links of a master."""
    stacks = np.split(flat(cube), split)
    packed = hdf5plugin.Bitshuffle(cname="lz4")
    base = path.name.removesuffix(".h5").removesuffix("_master")
    with opened(path, "w") as file:
        for i, stack in enumerate(stacks, 1):
            name = f"{base}_data_{i:06d}.h5"
            if external:
                with opened(path.parent / name, "w") as part:
                    chunks = (1, *stack.shape[1:])
                    part.create_dataset("entry/data/data", data=stack, chunks=chunks, **packed)
                file[f"entry/data/data_{i:06d}"] = link(name)
            else:
                file[f"entry/data/data_{i:06d}"] = stack
        detector = file.create_group("entry/instrument/detector")
        detector["count_time"], detector["frame_time"] = 1e-5, 1.2e-5
        detector["count_time"].attrs["units"] = "s"
        detector["beam_center_x"], detector["beam_center_y"] = 0.0, 0.0
        specific = detector.create_group("detectorSpecific")
        specific["ntrigger"], specific["nimages"] = triggers or (len(flat(cube)), 1)
        if mask:
            specific["pixel_mask"] = the_mask()
        specific["saturation_value"] = 60000
        file["entry/instrument/beam/incident_energy"] = 80.0
        file["entry/instrument/beam/incident_energy"].attrs["units"] = "keV"


def link(name, path="entry/data/data"):
    import h5py

    return h5py.ExternalLink(name, path)


CHANNELS = ("threshold_1", "threshold_2", "difference")


def save_channels(path, cube, default=True):
    """The newer layout: a virtual dataset (frames, channels, ky, kx) over files beside it."""
    import h5py

    stack = np.stack([flat(cube), flat(cube) // 2, flat(cube) - flat(cube) // 2], axis=1)
    layout = h5py.VirtualLayout(stack.shape, stack.dtype)
    for i, part in enumerate((stack[:7], stack[7:])):
        name = f"{path.stem}_data_{i + 1:06d}.h5"
        with opened(path.parent / name, "w") as file:
            file["data"] = part
        start = 7 * i
        layout[start : start + len(part)] = h5py.VirtualSource(name, "data", part.shape)
    with opened(path, "w") as file:
        data = file.create_group("entry/data")
        data.attrs.update(NX_class="NXdata", signal="data", axes=["image_id", "channel", ".", "."])
        if default:
            data.attrs["default_slice"] = [".", "threshold_1", ".", "."]
        data.create_virtual_dataset("data", layout)
        data["channel"] = list(CHANNELS)
        detector = file.create_group("entry/instrument/detector")
        detector["frame_time"], detector["saturation_value"] = 2e-5, 1000
        detector["beam_center_x"], detector["beam_center_y"] = 2.5, 1.25
        detector["threshold_2_channel/pixel_mask"] = the_mask()


AXES = (("y", 0.05, "nm"), ("x", 0.07, "nm"), ("ky", 0.2, "1/nm"), ("kx", 0.3, "1/nm"))
"""Name, step and unit of each axis."""
FACTS = {"scan_step_A": (0.5, 0.7), "detector_pixel_inv_A": (0.02, 0.03)}
"""What follows from them."""


def axis_values(cube):
    """Values along the axes; those of the detector are zero at (2, 3)."""
    centre = (0, 0, 2, 3)
    sizes = zip(AXES, cube.shape, centre, strict=True)
    return {name: (np.arange(n) - c) * step for (name, step, _), n, c in sizes}


def save_nexus(path, cube, old=False):
    """An NXdata group; `old`: as it was written before its attributes were."""
    with opened(path, "w") as file:
        file.attrs["default"] = "entry"
        entry = file.create_group("entry")
        entry.attrs.update(NX_class="NXentry", default="scan")
        data = entry.create_group("scan")
        data.attrs["NX_class"] = "NXdata"
        signal = data.create_dataset("counts", data=cube, chunks=(2, 2, *FRAME), compression="gzip")
        if old:
            signal.attrs["signal"] = 1
        else:
            data.attrs.update(signal="counts", axes=[name for name, _, _ in AXES])
        for i, (name, values) in enumerate(axis_values(cube).items()):
            data[name] = values
            data[name].attrs["units"] = AXES[i][2]
            if old:
                data[name].attrs["axis"] = i + 1
        file["entry/instrument/beam/incident_energy"] = 6e4


def signal_tree(group, cube, ragged=False, navigate=(True, True, False, False)):
    """What HyperSpy writes of a signal, into a group of either library."""
    for i, (values, nav) in enumerate(zip(axis_values(cube).values(), navigate, strict=True)):
        name, step, unit = AXES[i]
        axis = {"_type": "UniformDataAxis", "name": name, "units": unit, "scale": step}
        axis |= {"offset": float(values[0]), "size": len(values), "navigate": nav}
        group.create_group(f"axis-{i}").attrs.update(axis)
    group.create_group("metadata/Acquisition_instrument/TEM").attrs.update(
        {"beam_energy": 80.0, "convergence_angle": 25.0, "camera_length": 12.0}
    )
    group.create_group("attributes").attrs["ragged"] = ragged


def save_hspy(path, cube, titles=("scan",), **how):
    with opened(path, "w") as file:
        file.attrs.update(file_format="HyperSpy", file_format_version="3.3")
        for i, title in enumerate(titles):
            group = file.create_group(f"Experiments/{title}")
            group.create_dataset("data", data=cube + i, chunks=(2, 3, 2, 3), compression="gzip")
            signal_tree(group, cube, **how)


def save_zspy(path, cube, version: Any = 2):
    root = zarr.open_group(folder_of(path), mode="w", zarr_format=version)
    root.attrs.update({"file_format": "ZSpy", "file_format_version": "3.3"})
    group = root.create_group("Experiments/scan")
    group.create_array("data", data=cube, chunks=(2, 3, 2, 3))
    signal_tree(group, cube)
    zipped(path)


def save_zarr(path, cube, version: Any = 3, **how):
    """A group with the frames and something else."""
    root = zarr.open_group(folder_of(path), mode="w", zarr_format=version)
    root.create_array("scan/frames", data=cube, chunks=(2, 3, *FRAME), **how)
    root.create_array("scan/axis", data=np.arange(3))
    zipped(path)


def folder_of(path):
    """The folder of a store, beside the zip file that it becomes where the name ends so."""
    return path.with_suffix("") if path.suffix == ".zip" else path


def zipped(path):
    if path.suffix == ".zip":
        folder = folder_of(path)
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(part for part in folder.rglob("*") if part.is_file()):
                archive.write(file, file.relative_to(folder).as_posix())
        shutil.rmtree(folder)


def save_abtem(path, cube, **metadata):
    """A measurement as abTEM writes it."""
    root = zarr.open_group(folder_of(path), mode="w")
    root.create_array("array0", data=cube / 100, chunks=cube.shape)
    values = axis_values(cube).values()
    axes = {
        f"axis_{i}": {"units": unit, "sampling": step, "offset": float(along[0])}
        for i, ((_, step, unit), along) in enumerate(zip(AXES, values, strict=True))
    }
    said = {"axes": axes, "energy": 8e4, "semiangle_cutoff": 25, "data_origin": "abTEM_v1.0.9"}
    root.attrs["metadata0"] = said | metadata
    zipped(path)


def save_matlab(path, cube, order="ky kx y x", **more: Any):
    """An array `dp` whose MATLAB indices are `order`, and text, cells and a structure."""
    named = ("y", "x", "ky", "kx")
    shown = np.transpose(cube, [named.index(name) for name in order.split()])
    with opened(path, "w", userblock_size=512) as file:
        variables = {"dp": shown, "probe/start": np.zeros((6, 4))} | more
        for name, value in variables.items():
            # MATLAB hands HDF5 the sizes in reversed order.
            file[name] = value.T
            file[name].attrs["MATLAB_class"] = np.bytes_(value.dtype.name)
        file["name"] = np.array([[115, 99]], np.uint16)
        file["name"].attrs["MATLAB_class"] = np.bytes_("char")
        file["#refs#/a"] = cube
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")


def save_matlab_5(path):
    path.write_bytes(b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\1IM" + bytes(40))


def counts(seed=0):
    return some_cube(seed, np.uint16)


def save_berkeley(path, cube, order="y x ky kx"):
    """EMD 0.2: axes counted from one, their units in brackets."""
    known = {axis[0]: axis for axis in AXES}
    axes = [known[name] for name in order.split()]
    with opened(path, "w") as file:
        file.attrs.update(version_major=0, version_minor=2)
        group = file.create_group("data/scan")
        group.attrs["emd_group_type"] = 1
        group["data"] = cube
        for i, (axis, n) in enumerate(zip(axes, cube.shape, strict=True), 1):
            group[f"dim{i}"] = np.arange(n) * axis[1]
            unit = {"nm": "[n_m]", "1/nm": "[n_m^-1]"}[axis[2]]
            group[f"dim{i}"].attrs.update(name=axis[0], units=np.bytes_(unit))
        for name in ("microscope", "sample", "user", "comments"):
            file.create_group(name)


def save_py4dstem_12(path, cube, array="data", **calibration):
    """The tree of py4DSTEM up to 0.12; its axes are in pixels."""
    with opened(path, "w") as file:
        top = file.create_group("4DSTEM_experiment")
        top.attrs.update(emd_group_type=2, version_major=b"0", version_minor=b"12")
        group = top.create_group("data/datacubes/my scan")
        group.attrs["emd_group_type"] = 1
        group[array] = cube
        for i, n in enumerate(cube.shape, 1):
            group[f"dim{i}"] = np.arange(n, dtype=np.float32)
            group[f"dim{i}"].attrs.update(units=np.bytes_("[pix]"))
        for name, value in calibration.items():
            top[f"metadata/calibration/{name}"] = value
        top["metadata/microscope/convergence_semiangle_mrad"] = 25.0
        top["metadata/microscope"].attrs["accelerating_voltage"] = 80


def save_py4dstem_13(path, cube, **calibration):
    """The tree of py4DSTEM 0.13; of its axes only the first two entries are kept."""
    with opened(path, "w") as file:
        top = file.create_group("4DSTEM")
        top.attrs.update(emd_group_type="root", version_major="0", version_minor="13")
        group = top.create_group("my_scan")
        group.attrs.update(emd_group_type=1, py4dstem_class="DataCube")
        group["data"] = cube
        for i in range(4):
            group[f"dim{i}"] = np.arange(2)
            group[f"dim{i}"].attrs["units"] = "pixels"
        known = group.create_group("calibration")
        known.attrs["emd_group_type"] = 0
        for name, value in calibration.items():
            known[name] = value
