"""What the Poisson loss of single electrons costs, by each method, against whole patterns.

    python benchmarks/events.py [--quick] [--json FILE]

From exit waves to loss and gradient, in chunks as in a step, for 20 to 1500 pixels hit in a frame.
Records are those of `smatrix.py`, with `temporary_mb`: what the compiled function holds at once
beside its operands and results. The floor is one FFT of the sampled pattern each way; the peer is
the loss of whole patterns. Methods that `sparse.costs` expects to take eight times as long as the
best are left out.
"""

import argparse
import json
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex
from smatrix import Case, machine, measure, show, table, write

from smpr3d_jax.data.counts import Counts, Events, Frames
from smpr3d_jax.data.dataset import Batch
from smpr3d_jax.inverse.losses import event_poisson, Loss, objective, poisson
from smpr3d_jax.physics.detector import intensity
from smpr3d_jax.physics.sparse import costs, METHODS, pattern_at


CHUNK, INTEGRATION = 64, 2
WHOLE, SPREAD = "whole patterns, dense counts", "whole patterns, events"
FLOOR = "floor: FFTs of the sampled pattern"


class Camera(eqx.Module):
    """Given waves and a camera in their far field."""

    waves: Complex[Array, "frames 1 y x"]
    method: str = eqx.field(static=True, default="auto")

    def __call__(self, index):
        return intensity(self.waves[:, 0], INTEGRATION)

    def at(self, index, pixels):
        return pattern_at(self.waves, pixels, INTEGRATION, method=self.method)


def world(window: int, hits: int, frames: int):
    """Waves in chunks, and their counts as events and as frames: one or two electrons a hit."""
    rng, shape = np.random.default_rng(0), (window, window)
    chunks = frames // CHUNK
    parts = rng.normal(size=(2, chunks, CHUNK, 1, *shape)) * np.sqrt(hits / window**2)
    pixels = np.stack([rng.permutation(window**2)[:hits] for _ in range(chunks * CHUNK)])
    pixels = np.sort(pixels, axis=1).reshape(chunks, CHUNK, hits)
    n = rng.integers(1, 3, pixels.shape).astype(np.uint8)
    dense = np.zeros((chunks, CHUNK, window**2), np.uint8)
    np.put_along_axis(dense, pixels, n, axis=2)
    waves = jnp.asarray((parts[0] + 1j * parts[1]).astype(np.complex64))
    events = Events(jnp.asarray(pixels.astype(np.int32)), jnp.asarray(n), shape)
    return waves, events, Frames(jnp.asarray(dense.reshape(chunks, CHUNK, *shape)))


def gradient(loss, method: str, waves, counts):
    """A compiled function without arguments: loss and gradient of every chunk."""
    index = jnp.arange(CHUNK, dtype=jnp.int32)

    def one(pair):
        function = lambda waves: loss(Camera(waves, method), Batch(pair[1], index))
        return jax.value_and_grad(function)(pair[0])

    call = jax.jit(lambda *pair: jax.lax.map(one, pair)).lower(waves, counts).compile()
    return call, lambda: call(waves, counts)


def sweep(window: int, hits: int, frames: int, repeats: int) -> list:
    """Every method at one number of hits."""
    waves, events, dense = world(window, hits, frames)
    price = costs((window, window), hits, INTEGRATION)
    cheapest = min(price.values())
    ways: dict[str, tuple[Loss, str, Counts]] = {WHOLE: (objective(poisson()), "auto", dense)}
    ways[SPREAD] = (objective(poisson()), "auto", events)
    for method in (m for m in METHODS if price[m] < 8 * cheapest):
        label = f"events, {method}" + (" = auto" if price[method] == cheapest else "")
        ways[label] = (event_poisson(), method, events)
    calls = {n: gradient(loss, m, waves, counts) for n, (loss, m, counts) in ways.items()}
    truth, memory = calls[WHOLE][1](), {}
    for name, (call, run) in calls.items():
        for found, expected in zip(run(), truth, strict=True):
            if not jnp.linalg.norm(found - expected) < 1e-5 * jnp.linalg.norm(expected):
                raise RuntimeError(f"{name} and whole patterns disagree; times mean nothing.")
        analysis = call.memory_analysis()
        memory[name] = analysis and analysis.temp_size_in_bytes / 1e6
    transform = jax.jit(lambda w: jax.lax.map(jnp.fft.fft2, w))
    cases = {name: Case(run) for name, (_, run) in calls.items()}
    cases[FLOOR] = Case(lambda: transform(waves), 2)
    workload = f"loss and gradient M={window} f={INTEGRATION}, {frames} frames, {hits} hits"
    records = table(workload, measure(cases, repeats), FLOOR, WHOLE)
    return [{**r, "temporary_mb": memory.get(r["implementation"])} for r in records]


def main() -> None:
    """Run everything, print the table, write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the records to this file")
    parser.add_argument("--quick", action="store_true", help="fewer frames and repetitions")
    options = parser.parse_args()
    about, records = machine(), []
    print(json.dumps(about, indent=1))
    frames, repeats = (128, 3) if options.quick else (640, 9)
    for hits in (20, 100, 500, 1500):
        records += sweep(50, hits, frames, repeats)
    for hits in (50, 500):
        records += sweep(128, hits, 64 if options.quick else 128, repeats)
    show(records)
    write(records, options.json, about)


if __name__ == "__main__":
    main()
