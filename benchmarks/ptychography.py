"""What an epoch of ptychography costs and how near it comes, against the peers in one run.

    python benchmarks/ptychography.py [--quick] [--peers FOLDER] [--json FILE]

The workload is that of `../shared/peers` (`--peers`): 1024 frames of 128 x 128 pixels, 6 slices,
1e5 electrons each, batches of 32, positions fixed, float32. Its scripts run every peer that is
installed (PEERS) in a process of its own; the floor is the FFTs alone, 4 a slice, frame and state,
by the fastest library that is installed there (else JAX's own). Records are those of `smatrix.py`,
one epoch each, the least of the timed ones; ours are measured before and after the peers. Quality
is judged by the same scripts: amplitude error, and correlation of the phase with the truth.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from smatrix import Case, Cost, measure, show, table, write

import smpr3d_jax as sj
from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.physics.scan import Scan
from smpr3d_jax.physics.smatrix import field


HOME = pathlib.Path.home() / ".cache" / "smpr3d-peers"
PEERS = ("phaser", "ptyrad", "py4dstem", "quantem")
BATCH, EPOCHS = 32, 10
FLOOR = "floor: FFTs alone"


def environment(quick: bool) -> dict[str, str]:
    """What the peers' scripts want to know."""
    small = {"BENCH_DATA": "data_small.h5"} if quick else {}
    waits = {"OMP_WAIT_POLICY": "PASSIVE", "BENCH_WAIT_S": "1"}
    return {"BENCH_HOME": str(HOME / "bench"), **os.environ, **waits, **small}


def script(folder: pathlib.Path, name: str, python: str, env: dict, *words: object) -> list[dict]:
    """The JSON lines that a script of the peers prints; none where it fails."""
    command = [python, str(folder / name), *map(str, words)]
    answer = subprocess.run(command, env=env, capture_output=True, text=True)
    if answer.returncode:
        print(f"{name} failed: {answer.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]


def problem(slices: int, states: int) -> tuple[sj.Scattering, Dataset, dict]:
    """The empty object that all start from, on the truth's pixels, and the counts."""
    from bench_common import initial_modes, load_data  # type: ignore[import]

    d = load_data()
    n, energy, pixel = int(d["npix"]), float(d["energy_ev"]), float(d["pixel_ang"])
    optics = sj.focal_series(energy, float(d["semiangle_mrad"]), [float(d["defocus_init_ang"])])
    detector = sj.Detector((n, n), optics.wavelength / (n * pixel) * 1e3, integration=1)
    positions = (d["corner_px"] + n // 2) * pixel
    scan = Scan(jnp.asarray(positions, jnp.float32), jnp.zeros(len(positions), jnp.int32))
    grid, origin = field(positions, sj.Grid((n, n), (pixel, pixel)), 2)
    y, x = (float(np.rint(o / pixel) * pixel) for o in origin)
    depths = np.arange(slices) * float(d["slice_thickness_ang"]) * int(d["n_slices"]) / slices
    specimen = sj.empty_object(grid, (y, x), depths, "phase")
    dose = jnp.asarray([d["data"].sum(axis=(1, 2)).mean()], jnp.float32)
    modes = initial_modes(d["probe_init"], states) * np.sqrt(float(dose[0]))
    light = sj.Illumination(jnp.asarray(modes[None], jnp.complex64))
    model = sj.Scattering(optics, specimen, scan, detector, dose, illumination=light)
    counts = np.fft.ifftshift(d["data"], axes=(1, 2)).astype(np.uint16)
    rows, columns = (int(v) for v in d["scan_shape"])
    return sj.prepare(model), Dataset(Frames(jnp.asarray(counts)), scan, ((rows, columns),)), d


def rules(epochs: int, frames: int):
    """The rule whose steps fall to 0.3 in all."""
    batches = epochs * (frames // BATCH)
    fall = lambda rate: optax.exponential_decay(rate, batches, 0.3)
    return sj.pie.rpie(sj.losses.amplitude(), fall(0.9), fall(0.15))


def epoch(slices: int, states: int):
    """A function that runs one epoch from the start."""
    model, data, _ = problem(slices, states)
    loss, rule = sj.losses.objective(sj.losses.amplitude()), rules(EPOCHS, len(data))
    from smpr3d_jax.inverse.epochs import _epoch

    rows = np.random.default_rng(0).permutation(len(data)).reshape(-1, BATCH)
    rows, state = jnp.asarray(rows, jnp.int32), rule.init(model)
    return lambda: _epoch(loss, rule, model, state, data, rows, None)[2]


def quality(slices: int, states: int, epochs: int) -> dict:
    """A whole reconstruction, judged as the peers' are."""
    from bench_common import save_recon  # type: ignore[import]

    model, data, _ = problem(slices, states)
    loss, rule = sj.losses.objective(sj.losses.amplitude()), rules(epochs, len(data))
    core, wall = time.process_time(), time.perf_counter()
    result = sj.reconstruct_in_epochs(
        model, data, loss, rule, epochs=epochs, batch_size=BATCH,
        constraints=(sj.constraints.centred_probe,),
    )  # fmt: skip
    spent = time.process_time() - core, time.perf_counter() - wall
    found, window = result.model, model.window
    place = np.asarray(found.scan.positions) - np.asarray(found.specimen.origin)
    corner = place / window.sampling - np.asarray(window.shape) // 2
    plates = np.asarray(found.specimen.transmission(found.optics.energy))[0]
    name = f"smpr3d_jax_s{slices}_m{states}"
    save_recon(name, plates, np.asarray(found.illumination.modes[0]), corner)
    return {"name": name, "epochs": epochs, "core_seconds": spent[0], "wall_seconds": spent[1]}


def floor(folder: pathlib.Path, env: dict, count: int) -> Cost:
    """`count` transforms of 128 x 128 pixels by the fastest library."""
    python = HOME / "fft" / "bin" / "python"
    found = []
    if python.exists():
        for lib, threads in (("pyfftw_split", 2), ("pyfftw", 1)):
            found += script(folder, "w4_floor.py", str(python), env, "--lib", lib, "--n", 128,
                            "--threads", threads)  # fmt: skip
    laps = [lap for one in found for lap in one["laps"]]
    if laps:
        core, wall = (count * min(lap[k] for lap in laps) for k in ("cpu", "wall"))
        return Cost(core, wall, None)
    waves = jnp.ones((BATCH, 128, 128), jnp.complex64)
    pair = jax.jit(lambda w: jax.lax.map(lambda u: jnp.fft.ifft2(jnp.fft.fft2(u)), w))
    return measure({"jax": Case(lambda: pair(waves), count / (2 * BATCH))}, 5)["jax"]


def peers(folder: pathlib.Path, env: dict, slices: int, states: int, epochs: int):
    """Each installed peer's least epoch, and the name of what it kept."""
    costs, kept = {}, []
    for peer in PEERS:
        python = HOME / peer / "bin" / "python"
        if not python.exists():
            continue
        words = ("--slices", slices, "--modes", states, "--batch", BATCH, "--epochs", epochs,
                 "--tag", "_bench")  # fmt: skip
        for said in script(folder, f"w3_{peer}.py", str(python), env, *words):
            laps = said["laps"]
            core, wall = (min(lap[k] for lap in laps) for k in ("cpu", "wall"))
            costs[said["peer"]] = Cost(core, wall, said["peak_rss_mb"])
            kept.append(said["config"])
    return costs, kept


def compare(folder, env, slices: int, states: int, quick: bool) -> tuple[list[dict], list[dict]]:
    """Records of cost and of quality of one workload."""
    frames = 256 if quick else 1024
    run = epoch(slices, states)
    before = measure({"ours": Case(run)}, 2 if quick else 3)["ours"]
    others, kept = peers(folder, env, slices, states, 2 if quick else 4)
    bare = floor(folder, env, 4 * slices * states * frames)
    after = measure({"ours": Case(run)}, 2 if quick else 3)["ours"]
    ours = Cost(min(before.core, after.core), min(before.wall, after.wall), after.peak)
    best = min(others, key=lambda name: others[name].time, default=None)
    label = f"{slices} slices, {states} modes, an epoch of {frames} frames"
    costs = {"ours": ours, **others, FLOOR: bare}
    found = quality(slices, states, 2 if quick else EPOCHS)
    judged = script(folder, "evaluate.py", sys.executable, env, "--every", "8", found["name"],
                    *kept)  # fmt: skip
    about = {found["name"]: found}
    return table(label, costs, FLOOR, best), [{**about.get(j["name"], {}), **j} for j in judged]


def main() -> None:
    """Run everything, print the tables, write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the frames, one workload"
    )
    parser.add_argument("--peers", type=pathlib.Path, help="folder of the peers' scripts")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    folder = options.peers or pathlib.Path(__file__).parents[2] / "shared" / "peers"
    if not (folder / "gen_data.py").exists():
        parser.error(f"--peers {folder}: has no gen_data.py, which makes the workload")
    env = environment(options.quick)
    os.environ.update(env)
    sys.path.insert(0, str(folder))
    data = pathlib.Path(env["BENCH_HOME"]) / env.get("BENCH_DATA", "data.h5")
    if not data.exists():
        size = ("--scan", "16") if options.quick else ()
        script(folder, "gen_data.py", sys.executable, env, *size, "--out", data)
    records, judged = [], []
    for slices, states in ((6, 1),) if options.quick else ((6, 1), (1, 1), (6, 4)):
        costs, found = compare(folder, env, slices, states, options.quick)
        records, judged = records + costs, judged + found
        show(records)
    for one in judged:
        print(json.dumps(one))
    write(records + judged, options.json)


if __name__ == "__main__":
    main()
