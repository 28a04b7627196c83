"""Which leaves move, how fast, and where they may go: optax, with what optax lacks."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..physics.forward import Scattering
from ..physics.smatrix import Beams
from .losses import curvature, Noise


Name = str
"""The path of a leaf or subtree, or of several, with spaces, that one optimiser moves together."""


class Updates(NamedTuple):
    """An optimiser for each name, and which of the names move in this step."""

    optimisers: dict[Name, optax.GradientTransformationExtraArgs]
    moving: tuple[Name, ...]
    beats: dict[Name, "Beat"]
    own: tuple[str, ...] = ()
    resting: tuple[str, ...] = ()

    def init(self, model: PyTree) -> dict[Name, Any]:
        """The state of every optimiser before the first step."""
        labels = _labels(tuple(self.optimisers), model)
        pairs = enumerate(self.optimisers.items())
        return {name: o.init(_part(model, labels, at)) for at, (name, o) in pairs}

    def free(self, model: PyTree) -> PyTree:
        """True for each leaf of `model` that moves.

        **Raises:** ValueError for a name that matches no leaf of floating point numbers.
        """
        names = tuple(self.optimisers)
        groups = jax.tree.leaves(_labels(names, model))
        rests = lambda path: any(f"{path}.".startswith(f"{name}.") for name in self.resting)
        return jax.tree.unflatten(
            jax.tree.structure(model),
            [
                at >= 0 and names[at] in self.moving and not rests(path)
                for path, at in zip(named_leaves(model), groups, strict=True)
            ],
        )

    def free_of_frames(self, moving: PyTree) -> PyTree:
        """True for each leaf among those `moving` that has an entry for each frame."""
        own = [leaf and path in self.own for path, leaf in named_leaves(moving).items()]
        return jax.tree.unflatten(jax.tree.structure(moving), own)

    def follows_frames(self) -> bool:
        """Whether something moves of which each frame has its own entry."""
        single = [one for name in self.moving for one in _each(name)]
        return any(f"{path}.".startswith(f"{one}.") for path in self.own for one in single)

    def at(self, step: int) -> "Updates":
        """The updates of one step, numbered from 1: only what moves in it."""
        late = [name for name, beat in self.beats.items() if not beat.due(step)]
        moving = tuple(name for name in self.optimisers if name not in late)
        resting = tuple(name for name in late if name not in self.optimisers)
        return self._replace(moving=moving, resting=resting)

    def update(
        self,
        gradient: PyTree,
        state: dict[Name, Any],
        free: PyTree,
        value,
        value_fn: Callable,
        model: PyTree = None,
        index: Int[Array, " frames"] | None = None,
    ) -> tuple[PyTree, dict[Name, Any]]:
        """How far each leaf of `free` moves, and the new state; what does not move keeps its own.

        Each optimiser sees its own leaves alone, and `value_fn` takes those; the whole `model`
        and the batch's `index` go to all.
        """
        names = tuple(self.optimisers)
        labels, state, moves = _labels(names, free, missing=True), dict(state), []
        for name in self.moving:
            own, slope = (_part(tree, labels, names.index(name)) for tree in (free, gradient))
            move, state[name] = self.optimisers[name].update(
                slope, state[name], own, value=value, grad=slope,
                # Line searches want a function that takes what they are given.
                value_fn=lambda tree, model=None, index=None: value_fn(eqx.combine(tree, free)),
                model=model, index=index,
            )  # fmt: skip
            moves.append(move)
        return eqx.combine(*moves), state


class Beat(NamedTuple):
    """Moves in every `every`-th step from `first` on."""

    first: int
    every: int

    def due(self, step: int) -> bool:
        """Whether in this step."""
        return step >= self.first and (step - self.first) % self.every == 0


def per_leaf(
    optimisers: Mapping[Any, optax.GradientTransformation],
    beats: Mapping[Any, Beat] | None = None,
    own: Sequence[str] = (),
) -> Updates:
    """An optimiser for each named leaf or subtree, e.g. `{"specimen.waves": optax.adam(1e-2)}`.

    Names are paths with dots, as one writes them in Python (`optics.aberrations.C10`); where two
    match a leaf the longer one has it. A tuple of names shares one optimiser. What is not named
    stands still. `beats` says which names, or which leaves that share an optimiser with others
    (`optics`), move only in some of the steps; gradients that are not needed are not computed.
    `own` names the leaves of which each frame has its own entry, such as `scan.positions`: those
    of held-out frames follow these frames, which move nothing else.
    """
    complete = {_joined(n): optax.with_extra_args_support(o) for n, o in optimisers.items()}
    beats = {_joined(name): beat for name, beat in (beats or {}).items()}
    return Updates(complete, tuple(complete), beats, tuple(own))


def _joined(name: str | tuple[str, ...]) -> Name:
    return name if isinstance(name, str) else " ".join(name)


def _part(tree: PyTree, labels: PyTree, name: int) -> PyTree:
    """The leaves of `tree` that the name of this number has."""
    return eqx.filter(tree, jax.tree.map(lambda label: label == name, labels))


def _each(name: Name) -> tuple[str, ...]:
    return tuple(name.split())


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Every leaf by its path with dots, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(_key(k)) for k in path): leaf for path, leaf in leaves}


def _labels(names: tuple[Name, ...], tree: PyTree, missing: bool = False) -> PyTree:
    """`tree` with the number of the longest of `names` that leads to each leaf, or -1."""
    leaves, structure = named_leaves(tree), jax.tree.structure(tree)
    movable = {i: p for i, (p, leaf) in enumerate(leaves.items()) if eqx.is_inexact_array(leaf)}
    labels = [-1] * len(leaves)
    single = {one: number for number, name in enumerate(names) for one in _each(name)}
    for name in sorted(single, key=len):
        hit = [i for i, path in movable.items() if f"{path}.".startswith(f"{name}.")]
        if not hit and not missing:
            known = list(movable.values())
            near = difflib.get_close_matches(name, known, 3) or known
            raise ValueError(f"`per_leaf`: {name!r} matches no leaf of the model; nearest: {near}.")
        for i in hit:
            labels[i] = single[name]
    return jax.tree_util.tree_unflatten(structure, labels)


def _key(entry: Any) -> Any:
    return getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry)))


def largest_eigenvalue(model: Scattering, scan_step: tuple[float, float]) -> float:
    """Bound of the eigenvalues of A^H A, A the map from `specimen.waves` to all exit waves.

    On a raster of step (s_y, s_x) A^H A is diagonal but for aliases, with the eigenvalue
    (pixel area)/(s_y s_x) times the summed dose, divided by their number for beams (each carries
    that share of the probe). Steps above lambda/(2 alpha) tie tilts together that differ by a
    reciprocal vector of the raster; the factor is the most tilts so tied.
    """
    specimen, step = model.specimen, np.asarray(scan_step, float)
    share = specimen.waves.shape[0] if isinstance(specimen, Beams) else 1
    size = model.window.pixel_area / float(step.prod()) * float(jnp.sum(model.dose)) / share
    return size * _aliases(specimen.cutoff, step)


def accelerated(
    model: Scattering,
    noise: Noise,
    scan_step: tuple[float, float],
    frames: int,
    project: Callable[[Array], Array] | None = None,
) -> Updates:
    """Nesterov's method for `specimen.waves` at the largest step that is safe for `noise`.

    For the loss `losses.objective(noise)` over `frames` frames on a raster of `scan_step` (y, x)
    Å; `project` as in `nesterov`, such as `priors.depth_range`.
    """
    step = frames / (curvature(noise) * largest_eigenvalue(model, scan_step))
    return per_leaf({"specimen.waves": nesterov(step, project)})


def _aliases(cutoff: float, step: np.ndarray) -> int:
    """Most points of the raster's reciprocal lattice inside a disc of radius `cutoff`."""
    cell = [np.linspace(-0.5, 0.5, 33) / s for s in step]
    count = np.ceil(cutoff * step) + 1
    reach = [np.arange(-n, n + 1) / s for n, s in zip(count, step, strict=True)]
    y = cell[0][:, None, None, None] + reach[0][None, None, :, None]
    x = cell[1][None, :, None, None] + reach[1][None, None, None, :]
    return max(1, int((np.hypot(y, x) <= cutoff).sum(axis=(2, 3)).max()))


class NesterovState(NamedTuple):
    """The last point before extrapolation, the momentum's counter, the last loss, restarts."""

    point: PyTree
    theta: Float[Array, ""]
    value: Float[Array, ""]
    restarts: Int[Array, ""]


def nesterov(
    step: float,
    project: Callable[[Array], Array] | None = None,
    cap: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Nesterov's accelerated gradient with function-value restart (O'Donoghue & Candès 2015).

    The parameters handed in are the extrapolated point Y: S' = project(Y - step G) and
    Y' = S' + min((theta - 1)/theta', `cap`) (S' - S). When the loss at Y has risen, which costs no
    extra evaluation, the momentum starts again from nothing; so hand it the whole data in every
    step, for the loss of one batch says nothing about that of the last. `project` is applied to
    every leaf; Y keeps to what an affine projection keeps, other sets only hold S'
    (`NesterovState.point`). `update` needs the keyword `value`, the loss at Y, as optax's line
    searches do.
    """
    settle = project or (lambda leaf: leaf)

    def init(params):
        real = _real_dtype(params)
        theta, value = jnp.ones((), real), jnp.full((), jnp.inf, real)
        return NesterovState(params, theta, value, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, value=None, **_):
        if params is None or value is None:
            raise ValueError(
                "`nesterov` needs `params` and `value`: update(g, state, params, value=loss)."
            )
        value = jnp.asarray(value, state.value.dtype)
        rise = value > state.value
        theta = jnp.where(rise, jnp.ones_like(state.theta), state.theta)
        following = (1 + jnp.sqrt(1 + 4 * theta**2)) / 2
        # theta = 1 after a rise: no momentum in this step.
        momentum = jnp.minimum((theta - 1) / following, cap)
        point = jax.tree.map(lambda y, g: settle(y - step * g), params, updates)
        move = jax.tree.map(
            lambda new, old, y: new + momentum.astype(new.dtype) * (new - old) - y,
            point, state.point, params,
        )  # fmt: skip
        restarts = state.restarts + rise.astype(jnp.int32)
        return move, NesterovState(point, following, value, restarts)

    return optax.GradientTransformationExtraArgs(init, update)


def _real_dtype(tree: PyTree) -> np.dtype:
    """The widest real type among the leaves."""
    kinds = [np.dtype(jnp.finfo(leaf.dtype).dtype) for leaf in jax.tree.leaves(tree)]
    return max(kinds, key=lambda kind: kind.itemsize, default=np.dtype(np.float32))
