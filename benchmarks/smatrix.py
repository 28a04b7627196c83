"""How long the S-matrix kernels take, against peers and against what bounds them, in one run.

    python benchmarks/smatrix.py [--quick] [--json FILE]

Every comparison is made inside one process with its repetitions interleaved, and keeps the least
time of each. A record has the keys `workload`, `implementation`, `core_seconds` (processor time of
all threads), `wall_seconds`, `ratio_to_floor` (time divided by that of the workload's floor; 1 is
best), `ratio_to_peer` (time of the workload's peer divided by this; above 1 is faster than it) and
`peak_rss_mb` (of the process during one run; Linux). Ratios are of processor time on CPUs, which
other users of the machine disturb least, and of wall time elsewhere, where processor time is null.
The machine is described in a file beside FILE.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.dataset import Batch
from smpr3d_jax.inverse.batches import chunks, ordered
from smpr3d_jax.inverse.losses import objective, poisson
from smpr3d_jax.inverse.priors import depth_range, depth_range_basis
from smpr3d_jax.inverse.reconstruction import make_step, start
from smpr3d_jax.inverse.sections import depth_sections
from smpr3d_jax.inverse.updates import nesterov, per_leaf
from smpr3d_jax.physics.detector import Detector, intensity
from smpr3d_jax.physics.forward import Blocks, exit_waves, prepare, Scattering
from smpr3d_jax.physics.optics import aberration_phase, focal_series
from smpr3d_jax.physics.scan import raster, series_of
from smpr3d_jax.physics.smatrix import (
    Beams,
    field,
    TiltModes,
    unscattered_beams,
    unscattered_modes,
)


ENERGY, SEMIANGLE, PLANE, DOSE = 80e3, 25.0, 61.0, 16000.0
DEFOCI = (-150.0, 0.0, 100.0, 250.0)
ON_CPU = jax.default_backend() == "cpu"
GEMM = "floor: complex64 GEMM"


class Case(NamedTuple):
    """One implementation: what to run, and by how much to scale its times."""

    run: Callable[[], object]
    scale: float = 1.0


class Cost(NamedTuple):
    """Least times of a case and the process's highest memory while it ran."""

    core: float
    wall: float
    peak: float | None

    @property
    def time(self) -> float:
        """What ratios are made of."""
        return self.core if ON_CPU else self.wall

    def scaled(self, by: float) -> "Cost":
        """The cost of `by` as much work."""
        return Cost(self.core * by, self.wall * by, self.peak)


class Geometry(NamedTuple):
    """Window in pixels, detector pixel in mrad, scan step in window pixels, defoci in Å."""

    window: int
    pixel: float
    step: float
    defoci: tuple[float, ...]


SMALL = Geometry(64, 3.13, 2.0, (0.0,))
NANOTUBE = Geometry(50, 1.7399, 0.4 / 0.48, DEFOCI)


def measure(cases: dict[str, Case], repeats: int) -> dict[str, Cost]:
    """Costs of `cases`, run in turn `repeats` times."""
    costs = {name: Cost(np.inf, np.inf, _peak(case.run)) for name, case in cases.items()}
    for _ in range(repeats):
        for name, case in cases.items():
            core, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(case.run())
            wall, core = time.perf_counter() - wall, time.process_time() - core
            best = costs[name]
            least = min(best.core, core * case.scale), min(best.wall, wall * case.scale)
            costs[name] = Cost(*least, best.peak)
    return costs


def table(workload: str, costs: dict[str, Cost], floor: str | None, peer: str | None) -> list:
    """A record for each of `costs`; `floor` and `peer` name two of them."""
    return [
        {
            "workload": workload,
            "implementation": name,
            "core_seconds": cost.core if ON_CPU else None,
            "wall_seconds": cost.wall,
            "ratio_to_floor": cost.time / costs[floor].time if floor else None,
            "ratio_to_peer": costs[peer].time / cost.time if peer else None,
            "peak_rss_mb": cost.peak,
        }
        for name, cost in costs.items()
    ]


def _peak(run) -> float | None:
    """Compiles `run`, then runs it once more from a fresh high-water mark of memory, MB."""
    jax.block_until_ready(run())
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    jax.block_until_ready(run())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def world(geometry: Geometry, positions: tuple[int, int], representation: str, integration=1):
    """A model with a scattering specimen made up of noise, and its frames in order."""
    optics = focal_series(ENERGY, SEMIANGLE, list(geometry.defoci))
    detector = Detector((geometry.window, geometry.window), geometry.pixel, integration)
    window = detector.window(optics.wavelength)
    step = (geometry.step * window.sampling[0], geometry.step * window.sampling[1])
    scan = series_of([raster(positions, step)] * len(geometry.defoci))
    grid, origin = field(np.asarray(scan.positions), window)
    if representation == "modes":
        specimen = unscattered_modes(grid, origin, PLANE, optics.cutoff, 8)
    else:
        specimen = unscattered_beams(grid, window, origin, PLANE, optics.cutoff)
    noise = _noise(specimen.waves.shape)
    specimen = eqx.tree_at(lambda s: s.waves, specimen, specimen.waves + 0.03 * noise)
    dose = jnp.full(len(geometry.defoci), DOSE, jnp.float32)
    model = Scattering(optics, specimen, scan, detector, dose)
    frames = np.arange(len(scan.positions))
    chunk = 64 * len(geometry.defoci) if representation == "beams" else 64
    model = prepare(model, chunk=chunks(ordered(model, frames), min(chunk, len(frames)))[0])
    return model, ordered(model, frames), chunk


def _noise(shape):
    rng = np.random.default_rng(0)
    return jnp.asarray((rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64))


def gather_and_einsum(model: Scattering, positions: int):
    """The plain way: S with its tilts, gathered for every position, summed over beams.

    Returns the waves so written, and a function from them to (positions, scans, y, x).
    """
    assert isinstance(specimen := model.specimen, Beams)
    h = specimen.points
    y, x = specimen.grid.coordinates()
    turns = h[:, :1, None] * y[None] + h[:, 1:, None] * x[None]
    full = specimen.waves * jnp.asarray(np.exp(2j * np.pi * turns), jnp.complex64)
    ky, kx = (jnp.asarray(h[:, i], jnp.float32) for i in (0, 1))
    chi = np.asarray(aberration_phase(model.optics.aberrations, ky, kx, ENERGY), float)
    travel = np.pi * model.optics.wavelength * specimen.plane * np.sum(h**2, axis=1)
    size = np.sqrt(DOSE / (len(h) * np.prod(model.window.shape)))
    probe = size * np.exp(-1j * (chi + travel))
    rho = np.asarray(model.scan.positions[:positions], float) - specimen.origin
    weights = probe[None] * np.exp(-2j * np.pi * rho @ h.T)[:, None]
    weights = jnp.asarray(weights, jnp.complex64)
    nearest = np.floor(rho / model.window.sampling + 0.501).astype(int)
    pixel = [
        jnp.asarray(nearest[:, i, None] - n // 2 + np.arange(n))
        for i, n in enumerate(model.window.shape)
    ]

    def waves(full):
        windows = full[:, pixel[0][:, :, None], pixel[1][:, None, :]]
        return jnp.einsum("pdb,bpyx->pdyx", weights, windows)

    return full, waves


def beams(geometry: Geometry, side: int, repeats: int) -> list:
    """Exit waves of `side` x `side` positions, and the gradient of a quadratic loss of them."""
    model, order, _ = world(geometry, (side, side), "beams")
    scans, shape = len(geometry.defoci), model.window.shape
    index = jnp.asarray(np.arange(len(order)).reshape(scans, -1).T.ravel())
    full, gathered = gather_and_einsum(model, side * side)

    def grouped(waves):
        moved = eqx.tree_at(lambda m: m.specimen.waves, model, waves)
        return exit_waves(moved, index).reshape(-1, scans, *shape)

    weight = jnp.asarray(np.random.default_rng(1).uniform(size=(side**2, scans, *shape)), "f4")
    power = lambda function: lambda s: jnp.sum(weight * jnp.abs(function(s)) ** 2)
    forward = {"smpr3d_jax": (grouped, model.specimen.waves), "gather and einsum": (gathered, full)}
    forward = {name: (jax.jit(f), s) for name, (f, s) in forward.items()}
    ours, theirs = (f(s) for f, s in forward.values())
    if not jnp.linalg.norm(ours - theirs) < 1e-3 * jnp.linalg.norm(theirs):
        raise RuntimeError("grouped product and gather-and-einsum disagree; times mean nothing.")
    gradient = {name: (jax.jit(jax.grad(power(f))), s) for name, (f, s) in forward.items()}
    assert isinstance(model.plan, Blocks)
    union = math.prod(n + r for n, r in zip(shape, model.plan.reach, strict=True))
    size = (len(index), model.specimen.waves.shape[0], union)
    calls = {(kind, name): call for kind, part in (("forward", forward), ("gradient", gradient))
             for name, call in part.items()}  # fmt: skip
    cases = {" ".join(key): Case(lambda f=f, s=s: f(s)) for key, (f, s) in calls.items()}
    costs = measure({**cases, **_gemms(size)}, repeats)
    gemm = min((cost for name, cost in costs.items() if name not in cases), key=lambda c: c.time)
    records = []
    for kind, products in (("forward", 1), ("gradient", 2)):
        part = {name: costs[f"{kind} {name}"] for name in forward}
        part[GEMM] = gemm.scaled(products)
        part[f"{GEMM}, share of the crops' pixels"] = gemm.scaled(
            products * math.prod(shape) / union
        )
        workload = f"beams M={shape[0]} B={size[1]} {side}x{side} positions x {scans} scans, {kind}"
        records += table(workload, part, GEMM, "gather and einsum")
    return records


def _gemms(size: tuple[int, int, int]) -> dict[str, Case]:
    """Complex64 products (rows x beams)(beams x pixels), by JAX and on CPUs also by numpy."""
    left, right = _noise(size[:2]), _noise(size[1:])
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    cases = {"jax": Case(lambda: multiply(left, right))}
    if ON_CPU:
        a, b = np.asarray(left), np.asarray(right)
        cases["numpy"] = Case(lambda: a @ b)
    return cases


def steps(quick: bool, repeats: int) -> list:
    """A whole gradient step on data of the nanotubes' size, 6400 frames, with pixel integration.

    Where fewer frames are given, the time is scaled to all of them, updates included.
    """
    cases = {}
    for kind, count in (("modes", 1280 if quick else 6400), ("beams", 256 if quick else 768)):
        label = kind if count == 6400 else f"{kind}, scaled from {count} frames"
        cases[label] = _step(kind, count)
    workload = "iteration, 6400 frames = 1600 positions x 4 scans"
    return table(workload, measure(cases, repeats), None, list(cases)[1])


def _step(kind: str, count: int) -> Case:
    model, order, chunk = world(NANOTUBE, (40, 40), kind, integration=2)
    values = np.random.default_rng(2).poisson(DOSE / 2500, (count, 50, 50)).astype(np.uint8)
    frames = Batch(Frames(jnp.asarray(values)), jnp.asarray(order[:count], jnp.int32))
    project = None
    if isinstance(model.specimen, TiltModes):
        basis = depth_range_basis(model.specimen, ENERGY, (0.0, 122.0))
        project = depth_range(model.specimen, basis)
    updates = per_leaf({"specimen.waves": nesterov(1e-7, project)})
    step, state = make_step(objective(poisson()), updates, chunk), start(model, updates)
    return Case(lambda: step(model, state, frames)[2], len(order) / count)


def sections(quick: bool, repeats: int) -> list:
    """Depth sections a plane, against a Fourier transform of S shared by all and one back each."""
    records, depths = [], np.linspace(-40.0, 180.0, 8 if quick else 45)
    transform = jax.jit(lambda s: jnp.fft.fft2(s).sum(0))
    back = jax.jit(lambda s: jax.lax.map(jnp.fft.ifft2, s))
    for kind in ("modes", "beams"):
        if kind == "beams":
            depths = depths[:4]
        specimen = world(NANOTUBE, (40, 40), kind)[0].specimen
        planes = _noise((len(depths), *specimen.grid.shape))
        cases = {
            "smpr3d_jax": lambda s=specimen, z=depths: depth_sections(s, ENERGY, z),
            "floor: FFTs": lambda s=specimen, p=planes: (transform(s.waves), back(p)),
        }
        cases = {name: Case(run, 1 / len(depths)) for name, run in cases.items()}
        label = f"section a plane of {len(depths)}, {specimen.waves.shape[0]} {kind}"
        records += table(label, measure(cases, repeats), "floor: FFTs", None)
    return records


def padded_intensity(wave):
    """Pixel integration the plain way: pad, transform, bin [1/2, 1, 1/2]."""
    size = wave.shape[-1]
    fine = jnp.abs(jnp.fft.fft2(jnp.pad(wave, ((0, 0), (0, size), (0, size))), norm="ortho")) ** 2
    for axis in (1, 2):
        fine = fine + (jnp.roll(fine, 1, axis) + jnp.roll(fine, -1, axis)) / 2
    return fine[:, ::2, ::2]


def detector(repeats: int, frames: int = 1280, chunk: int = 64) -> list:
    """Exit waves to Poisson loss and back, in chunks as in a step."""
    waves = _noise((frames // chunk, chunk, 50, 50))
    counts = jnp.asarray(np.random.default_rng(3).poisson(1.0, waves.shape), jnp.float32)
    noise = jax.vmap(jax.vmap(jax.vmap(poisson())))
    loss = lambda function: lambda w, n: jnp.sum(noise(function(w), n))
    functions = {
        "sampled": lambda w: intensity(w, 1),
        "pixel integration": lambda w: intensity(w, 2),
        "pixel integration, padded": padded_intensity,
    }
    over = lambda f: jax.jit(lambda w, n: jax.lax.map(lambda pair: f(*pair), (w, n)))
    transform, records = over(lambda w, n: jnp.fft.fft2(w)), []
    floor, peer = "floor: FFTs of the sampled pattern", "pixel integration, padded"
    for kind, passes, lift in (
        ("forward", 1, loss),
        ("gradient", 2, lambda f: jax.value_and_grad(loss(f))),
    ):
        calls = {name: over(lift(f)) for name, f in functions.items()}
        cases = {name: Case(lambda f=f: f(waves, counts)) for name, f in calls.items()}
        cases[floor] = Case(lambda: transform(waves, counts), passes)
        name = f"detector and loss M=50, {frames} frames, {kind}"
        records += table(name, measure(cases, repeats), floor, peer)
    return records


def machine() -> dict:
    """What the times depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "devices": [d.device_kind for d in jax.devices()],
        "backend": jax.default_backend(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def show(records: list) -> None:
    """The table, one line a record."""
    number = lambda v, form: "-".rjust(9) if v is None else format(v, form).rjust(9)
    workload = None
    for r in records:
        if r["workload"] != workload:
            workload = r["workload"]
            print(f"\n{workload:<62}{'core s':>9}{'wall s':>9}{'/ floor':>9}{'x peer':>9}{'MB':>9}")
        cells = [number(r[k], ".4f") for k in ("core_seconds", "wall_seconds")]
        cells += [number(r[k], ".2f") for k in ("ratio_to_floor", "ratio_to_peer")]
        print(f"  {r['implementation']:<60}{''.join(cells)}{number(r['peak_rss_mb'], '.0f')}")


def write(records: list[dict], file: pathlib.Path | None, about: dict | None = None) -> None:
    """The records so far, and beside them the machine, as it was or is; nothing without a file."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records, indent=1) + "\n")
        beside = file.with_suffix(".machine.json")
        beside.write_text(json.dumps(about or machine(), indent=1) + "\n")


def main() -> None:
    """Run everything, print the table, write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the records to this file")
    parser.add_argument("--quick", action="store_true", help="smaller problems, fewer repetitions")
    options = parser.parse_args()
    about, side, repeats = machine(), 4 if options.quick else 8, 3 if options.quick else 7
    print(json.dumps(about, indent=1))
    records = beams(SMALL, side, repeats) + beams(NANOTUBE, side, repeats)
    records += detector(repeats) + sections(options.quick, 2) + steps(options.quick, 2)
    show(records)
    write(records, options.json, about)


if __name__ == "__main__":
    main()
