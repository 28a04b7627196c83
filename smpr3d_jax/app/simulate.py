"""Made-up experiments: a structure, how it is recorded, and the files a microscope would leave.

Structures are ASE's, with z along the beam from the plane on which a scan of defocus 0 is focused;
our x and y are ASE's. A written series is a folder with `scan_i.h5` (EMD 1.0 datacubes),
`experiment.yaml`, which `smpr3d run` takes, and `truth.h5`: `slices_V_A` (slice, y, x),
`slice_z_A` (the end of each slice), `atoms_xyz_A` (columns y, x, z), `numbers`, `layer`,
`positions_A` (scan, position, 2) in the cell, and the attributes `pixel_A`, `extent_A`, `cell_z_A`,
`jitter_A`, `aberrations`; with two layers also `z_upper_A` and `z_lower_A`.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ase
import ase.build
import ase.io
import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, UInt
from ruamel.yaml import YAML

from ..data.readers.emd import write_emd
from ..data.readers.hdf5 import written
from ..physics.optics import focal_series, wavelength
from ..physics.scan import raster, series_of
from ..physics.simulation import simulate_series
from ..physics.specimen import Slices, slices_from_atoms
from .experiment import from_mapping


class Acquisition(eqx.Module):
    """How a focal series is recorded; every number is the true one.

    Energy in eV, `semiangle` and `detector_angle` (the least half width of the detector) in mrad,
    `aberrations` polar in Å and rad, one `defocus` (Å) a scan, `scan_step` in Å, `dose` in
    electrons per Å² and scan. Each position of each scan is off by a Gaussian of `jitter` Å rms
    along either axis. The cell is sampled at least as finely as `sampling` Å, cut into slices of
    `slice_thickness` Å, and its Fourier transform binned by `bin` on the detector.
    """

    energy: float = 80e3
    semiangle: float = 25.0
    defocus: tuple[float, ...] = (-150.0, 0.0, 100.0, 250.0)
    aberrations: Mapping[str, float] = eqx.field(default_factory=dict)
    scan_shape: tuple[int, int] = (24, 24)
    scan_step: float = 0.4
    dose: float = 1e5
    jitter: float = 0.0
    detector_angle: float = 42.0
    sampling: float = 0.2
    slice_thickness: float = 3.0
    bin: int = 2
    seed: int = 0

    def __check_init__(self):
        if not self.defocus:
            raise ValueError("`Acquisition.defocus` needs a value (Å) for each scan, got none.")
        if "C10" in self.aberrations:
            raise ValueError(
                f"`Acquisition.aberrations` holds C10 = {self.aberrations['C10']}; the defocus "
                "(= -C10) belongs to each scan, in `defocus`."
            )
        for name in ("dose", "scan_step", "sampling", "slice_thickness", "detector_angle"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"`Acquisition.{name}` must be positive, got {getattr(self, name)}."
                )
        if self.jitter < 0 or min(*self.scan_shape, self.bin) < 1:
            raise ValueError(
                "`Acquisition` needs a jitter >= 0 Å, a scan of at least one position and a bin of "
                f"at least 1, got {self.jitter}, {self.scan_shape} and {self.bin}."
            )


class Series(eqx.Module):
    """Counted frames of every scan, zero frequency in the centre, and what is true of them.

    `positions` (y, x) in Å are in the cell.
    """

    frames: tuple[UInt[np.ndarray, "scan_y scan_x ky kx"], ...]
    positions: Float[np.ndarray, "scans positions 2"]
    slices: Slices
    atoms: ase.Atoms
    acquisition: Acquisition

    @property
    def detector_pixel(self) -> float:
        """Angle of a detector pixel in mrad."""
        return _detector_pixel(self.acquisition, self.slices.grid.extent)


def two_nanotubes(
    cell: float = 40.0,
    upper: tuple[int, int] = (6, 6),
    lower: tuple[int, int] = (8, 0),
    angle: float = 70.0,
    separation: float = 90.0,
    margin: float = 12.0,
) -> ase.Atoms:
    """Two carbon nanotubes that cross in projection, `separation` Å apart along the beam.

    The `upper` one (chiral indices) lies along y in the middle of a square `cell` (Å); the `lower`
    is turned from it by `angle` degrees. `margin` Å of vacuum stand before and behind. Tags tell
    the tubes apart: 0 upper, 1 lower.
    """
    tubes = []
    for tag, (indices, turn) in enumerate(((upper, 0.0), (lower, math.radians(angle)))):
        period = np.asarray(ase.build.nanotube(*indices, length=1).cell)[2, 2]
        length = math.ceil(math.sqrt(2) * cell / period) + 1
        across, deep, along = ase.build.nanotube(*indices, length=length).positions.T
        along = along - along.mean()
        # (-across, along, deep) is a rotation of the tube; a reflection would change its hand.
        x = math.sin(turn) * along - math.cos(turn) * across + cell / 2
        y = math.cos(turn) * along + math.sin(turn) * across + cell / 2
        inside = (np.minimum(x, y) >= 0) & (np.maximum(x, y) < cell)
        positions = np.stack([x, y, deep], axis=-1)[inside]
        tubes.append(ase.Atoms(f"C{inside.sum()}", positions, tags=[tag] * int(inside.sum())))
    above, below = tubes
    above.positions[:, 2] += margin - above.positions[:, 2].min()
    middle = above.positions[:, 2].mean()
    below.positions[:, 2] += middle + separation - below.positions[:, 2].mean()
    atoms = above + below
    atoms.set_cell([cell, cell, atoms.positions[:, 2].max() + margin])
    atoms.pbc = (True, True, False)
    return atoms


def read_structure(path: str | os.PathLike) -> ase.Atoms:
    """The last structure in a file of any format that ASE reads, z along the beam.

    **Raises:** ValueError naming the file, if there is none or ASE cannot read it.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path}: no such structure file.")
    try:
        atoms = ase.io.read(pathlib.Path(path))
    except Exception as error:  # ASE's readers raise whatever their formats lead to
        raise ValueError(
            f"{path}: ASE cannot read a structure from it ({type(error).__name__}: {error}); use a "
            "format with a cell, such as CIF, POSCAR or extended XYZ."
        ) from error
    assert isinstance(atoms, ase.Atoms)
    return atoms


def simulate(atoms: ase.Atoms, acquisition: Acquisition | None = None) -> Series:
    """Record a focal series of a structure; the raster stands in the middle of its square cell.

    **Raises:** ValueError for a cell that is not square or that the raster does not fit into.
    """
    how = acquisition or Acquisition()
    slices = slices_from_atoms(atoms, how.sampling, how.slice_thickness, how.bin)
    extent = slices.grid.extent
    if not math.isclose(*extent, rel_tol=1e-6):
        raise ValueError(
            f"The cell is {extent[0]:.6g} Å along y and {extent[1]:.6g} Å along x; it must be "
            "square, since a detector has square pixels. Repeat or pad the structure."
        )
    positions = _positions(how, extent)
    half = math.ceil(how.detector_angle / _detector_pixel(how, extent))
    frames = simulate_series(
        slices,
        focal_series(how.energy, how.semiangle, list(how.defocus), how.aberrations),
        series_of(list(positions)),
        (2 * half, 2 * half),
        how.bin,
        key=jax.random.key(how.seed),
        dose=how.dose * how.scan_step**2,
    )
    frames = np.fft.fftshift(np.asarray(frames), axes=(-2, -1))
    shape = (len(how.defocus), *how.scan_shape, *frames.shape[1:])
    return Series(tuple(frames.reshape(shape)), positions, slices, atoms, how)


def _detector_pixel(how: Acquisition, extent: tuple[float, float]) -> float:
    return 1e3 * wavelength(how.energy) * how.bin / extent[0]


def _positions(
    how: Acquisition, extent: tuple[float, float]
) -> Float[np.ndarray, "scans positions 2"]:
    """The raster of each scan, centred in the cell, every position off by the jitter."""
    size = [(n - 1) * how.scan_step for n in how.scan_shape]
    if max(size) >= extent[0]:
        raise ValueError(
            f"A raster of {how.scan_shape} positions, {how.scan_step} Å apart, does not fit into a "
            f"cell of {extent[0]:.4g} Å."
        )
    corner = (np.asarray(extent) - size) / 2
    nominal = corner + raster(how.scan_shape, (how.scan_step, how.scan_step))
    off = np.random.default_rng(how.seed).normal(size=(len(how.defocus), *nominal.shape))
    return nominal + how.jitter * off


def write_series(
    folder: str | os.PathLike,
    series: Series,
    title: str = "simulated series",
    stated_defocus: Sequence[float] | None = None,
    stated_aberrations: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Write scans, truth and experiment file into `folder`; returns the experiment file's path.

    `stated_defocus` and `stated_aberrations` are what the experiment file says where that is not
    the truth; the jitter of the positions it never says.
    """
    folder = pathlib.Path(folder)
    how = series.acquisition
    stated = how.defocus if stated_defocus is None else tuple(stated_defocus)
    if len(stated) != len(how.defocus):
        raise ValueError(
            f"`stated_defocus` has {len(stated)} values for {len(how.defocus)} scans: {stated}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for i, frames in enumerate(series.frames):
        path = folder / f"scan_{i}.h5"
        write_emd(path, frames, how.scan_step, series.detector_pixel, how.energy)
    _write_truth(folder / "truth.h5", series)
    aberrations = how.aberrations if stated_aberrations is None else stated_aberrations
    content = _experiment(series, title, stated, aberrations)
    from_mapping(content, source=str(folder / "experiment.yaml"), folder=folder)
    with open(folder / "experiment.yaml", "w", encoding="utf-8") as file:
        writer = YAML()
        writer.default_flow_style, writer.width = None, 120
        writer.dump(content, file)
    return folder / "experiment.yaml"


def _experiment(
    series: Series, title: str, defocus: Sequence[float], aberrations: Mapping[str, float]
) -> dict[str, Any]:
    """The keys of an experiment file; sections reach 20 Å beyond the atoms."""
    how, z = series.acquisition, series.atoms.positions[:, 2]
    step = 5.0
    start, stop = (step * round(v / step) for v in (z.min() - 20, z.max() + 20))
    return {
        "title": title,
        "beam": {
            "energy_ev": how.energy,
            "semiangle_mrad": how.semiangle,
            "aberrations": {name: float(value) for name, value in aberrations.items()},
        },
        "scans": [{"file": f"scan_{i}.h5", "defocus": float(d)} for i, d in enumerate(defocus)],
        "geometry": {
            "scan_step": how.scan_step,
            "rotation_deg": 0.0,
            "transpose": False,
            "detector_pixel_mrad": series.detector_pixel,
        },
        "method": {"name": "smatrix", "representation": "modes"},
        "sections": {"start": start, "stop": stop, "step": step},
    }


def _write_truth(path: pathlib.Path, series: Series) -> None:
    how, atoms, layer = series.acquisition, series.atoms, series.atoms.get_tags()
    slices, ends = _all_slices(series)
    arrays = {
        "slice_z_A": ends,
        "atoms_xyz_A": atoms.positions[:, [1, 0, 2]],
        "numbers": atoms.numbers,
        "layer": layer,
        "positions_A": series.positions,
    }
    with written(path) as file:
        file.create_dataset("slices_V_A", data=slices, compression="gzip", chunks=True)
        for name, values in arrays.items():
            file.create_dataset(name, data=values)
        file.attrs.update(
            pixel_A=series.slices.grid.sampling[0],
            extent_A=series.slices.grid.extent[0],
            cell_z_A=float(np.asarray(atoms.cell)[2, 2]),
            jitter_A=how.jitter,
            aberrations=json.dumps(dict(how.aberrations)),
        )
        if set(layer) == {0, 1}:
            file.attrs["z_upper_A"] = atoms.positions[layer == 0, 2].mean()
            file.attrs["z_lower_A"] = atoms.positions[layer == 1, 2].mean()


def _all_slices(
    series: Series,
) -> tuple[Float[np.ndarray, "slices y x"], Float[np.ndarray, " slices"]]:
    """Every slice from z = 0 to the last atom, empty ones too, and where each ends."""
    thickness = series.acquisition.slice_thickness
    index = np.floor(np.asarray(series.slices.depths) / thickness).astype(int)
    first = min(0, int(index.min()))
    count = int(index.max()) + 1 - first
    slices = np.zeros((count, *series.slices.grid.shape), np.float32)
    slices[index - first] = np.asarray(series.slices.potential)
    return slices, thickness * (first + 1.0 + np.arange(count))
