"""Step rules of ptychography as optax transforms: ePIE, rPIE and LSQ-ML, batch by batch.

The iterative engines divide the gradient by how strongly a pixel is lit, which is a diagonal
estimate of its curvature. With the noise model's curvature c in |Z| (`losses.curvature`), the loss
of a batch of B frames has in pixel r of slice s no more than (c S/B) D_s(r), where
D_s = sum_j |P_s(r - r_j)|² is the light that the batch throws on it and S the number of slices,
which move at once. So

    t <- t - step (B/c S) g/((1 - alpha) D_s + alpha max D_s),   P <- P - step (B/c n) g_P,

n the batch's frames of a scan: a step of 1 is safe, and minimises the loss of one frame where
slices and probe are alone. alpha = 1 is ePIE (Maiden & Rodenburg 2009), smaller ones rPIE (Maiden,
Johnson & Li 2017). LSQ-ML (Odstrcil, Menzel & Guizar-Sicairos 2018) takes the same directions and
finds for each of them how far to go by least squares of the waves on the detector.

Transforms are for the leaves `specimen.values` and `illumination.modes` of a `Scattering` with
`ObjectSlices`, and want the keywords `model` and `index` that `make_step` gives. They hand on a
step that is to be added, so chain momentum (`optax.trace`) or a schedule behind them.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..physics.forward import exit_waves, Scattering
from ..physics.fourier import fft, ifft
from ..physics.optics import interaction_parameter
from ..physics.ptychography import entrance_modes, ObjectSlices, propagators
from ..physics.smatrix import place
from .losses import curvature, Noise
from .updates import per_leaf, Updates


def lit(model: Scattering, index: Int[Array, " frames"]) -> Float[Array, "slices y x"]:
    """Electrons per pixel that the frames `index` throw on each slice, through empty ones."""
    specimen = _object(model)
    modes = entrance_modes(model.optics, specimen, model.illumination, model.window, model.dose)
    steps, _ = propagators(specimen, model.window, model.optics.energy)
    planes, waves = [_power(modes)], modes
    for step in steps:
        waves = ifft(fft(waves) * step[None, None].astype(waves.dtype))
        planes.append(_power(waves))
    light = jnp.stack(planes, axis=1)
    corner, _ = place(specimen, model.scan.positions[index], model.window)

    def add(total, frame):
        at, scan = frame
        start, shape = (jnp.zeros((), at.dtype), at[0], at[1]), light.shape[1:]
        patch = jax.lax.dynamic_slice(total, start, shape) + light[scan]
        return jax.lax.dynamic_update_slice(total, patch, start), None

    nothing = jnp.zeros((light.shape[1], *specimen.grid.shape), light.dtype)
    return jax.lax.scan(add, nothing, (corner, model.scan.series[index]))[0]


def _power(waves):
    return jnp.sum(waves.real**2 + waves.imag**2, axis=1)


def _object(model) -> ObjectSlices:
    if not isinstance(getattr(model, "specimen", None), ObjectSlices):
        raise ValueError(
            "`pie`: these step rules are for a `Scattering` with `ObjectSlices`, got "
            f"{type(getattr(model, 'specimen', model)).__name__}."
        )
    return model.specimen


def _told(model: Scattering | None, index: Array | None) -> tuple[Scattering, Array]:
    if model is None or index is None:
        raise ValueError("`pie`: `update` wants the keywords `model` and `index` of the batch.")
    return model, index


def scale_by_light(noise: Noise, alpha: float = 0.1) -> optax.GradientTransformationExtraArgs:
    """The preconditioned step of leaf `specimen.values`; see the module.

    **Raises:** ValueError unless 0 < alpha <= 1.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"`scale_by_light`: alpha must lie in 0 < alpha <= 1, got {alpha}.")
    bend = curvature(noise)

    def update(updates, state, params=None, *, model=None, index=None, **_):
        model, index = _told(model, index)
        specimen = _object(model)
        light = lit(model, index)
        most = jnp.max(light, axis=(1, 2), keepdims=True)
        size = ((1 - alpha) * light + alpha * most) * (light.shape[0] * bend / index.shape[0])
        if specimen.kind == "potential":
            size = size * interaction_parameter(model.optics.energy) ** 2
        share = specimen.shares[:, None, None, None]
        return jax.tree.map(lambda g: -g / (size[None] * share).astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_frames(noise: Noise) -> optax.GradientTransformationExtraArgs:
    """The preconditioned step of leaf `illumination.modes`; see the module."""
    bend = curvature(noise)

    def update(updates, state, params=None, *, model=None, index=None, **_):
        model, index = _told(model, index)
        scans = model.dose.shape[0]
        frames = jnp.zeros(scans, model.dose.dtype).at[model.scan.series[index]].add(1)
        size = jnp.maximum(frames, 1)[:, None, None, None] * (bend / index.shape[0])
        return jax.tree.map(lambda g: -g / size.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def rpie(
    noise: Noise,
    step: optax.ScalarOrSchedule = 0.9,
    probe_step: optax.ScalarOrSchedule = 0.15,
    alpha: float = 0.1,
    momentum: float = 0.0,
    probe_from: int = 0,
) -> Updates:
    """rPIE for object and probe; `alpha` 1 is ePIE.

    **Arguments:** steps are fractions of the safe ones, or schedules over batches; `momentum` of
    both (0: none); the probe stands still for the first `probe_from` batches.
    """
    late = lambda count: jnp.where(count < probe_from, 0.0, _at(probe_step, count))
    tail = lambda rate: (
        optax.trace(momentum) if momentum else optax.identity(), optax.scale_by_schedule(rate)
    )  # fmt: skip
    return per_leaf(
        {
            "specimen.values": optax.chain(
                scale_by_light(noise, alpha), *tail(lambda count: _at(step, count))
            ),
            "illumination.modes": optax.chain(scale_by_frames(noise), *tail(late)),
        }
    )


def epie(
    noise: Noise,
    step: optax.ScalarOrSchedule = 0.9,
    probe_step: optax.ScalarOrSchedule = 0.15,
) -> Updates:
    """ePIE for object and probe: `rpie` with alpha = 1, slow where a pixel is dimly lit."""
    return rpie(noise, step, probe_step, alpha=1.0)


def _at(rate: optax.ScalarOrSchedule, count):
    return rate(count) if callable(rate) else rate


class _Pair(NamedTuple):
    """The leaves that LSQ-ML moves together, or what belongs to them."""

    values: PyTree
    modes: PyTree


def lsqml(noise: Noise, relaxation: optax.ScalarOrSchedule = 0.5, alpha: float = 0.1) -> Updates:
    """LSQ-ML: how far object and probe go along their directions, by least squares.

    With dZ_o and dZ_p what a safe step along either direction does to the waves of the batch, the
    lengths (a_o, a_p) minimise the quadratic model of the loss, sum g.(a_o d_o + a_p d_p) + c/2B
    sum |a_o dZ_o + a_p dZ_p|², which takes three forward passes more; `relaxation` of them are
    gone. Lengths are those of the batch, not of each frame.
    """
    bend = curvature(noise)
    own = _Pair(scale_by_light(noise, alpha), scale_by_frames(noise))

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, model=None, index=None, **also):
        pair = _Pair(updates.specimen.values, updates.illumination.modes)
        ways = _Pair(*(
            rule.update(g, optax.EmptyState(), None, model=model, index=index)[0]
            for rule, g in zip(own, pair, strict=True)
        ))  # fmt: skip
        lengths = _lengths(model, index, pair, ways, bend)
        rate = _at(relaxation, state.count)
        found = _Pair(*(rate * a.astype(w.dtype) * w for a, w in zip(lengths, ways, strict=True)))
        where = lambda tree: (tree.specimen.values, tree.illumination.modes)
        return eqx.tree_at(where, updates, tuple(found)), optax.ScaleByScheduleState(
            state.count + 1
        )

    rule = optax.GradientTransformationExtraArgs(init, update)
    return per_leaf({("specimen.values", "illumination.modes"): rule})


def _lengths(model, index, slopes: _Pair, ways: _Pair, bend: float):
    """Where the quadratic model of the loss is least in the plane of both directions."""
    where = lambda m: (m.specimen.values, m.illumination.modes)

    def seen(values, modes):
        return exit_waves(eqx.tree_at(where, model, (values, modes)), index)

    values, modes = where(model)
    here = seen(values, modes)
    # Differences, since waves are derivable in reverse alone; a safe step is short enough.
    moves = [seen(values + ways.values, modes) - here, seen(values, modes + ways.modes) - here]
    inner = lambda a, b: jnp.sum((a.conj() * b).real)
    scale = bend / index.shape[0]
    matrix = scale * jnp.stack([jnp.stack([inner(a, b) for b in moves]) for a in moves])
    slope = jnp.stack([inner(g, d) for g, d in zip(slopes, ways, strict=True)])
    ridge = 1e-6 * jnp.trace(matrix) * jnp.eye(2, dtype=matrix.dtype)
    return jnp.maximum(-jnp.linalg.solve(matrix + ridge, slope), 0)
