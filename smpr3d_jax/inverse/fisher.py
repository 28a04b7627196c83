"""Fisher information of Poisson counts on the leaves of a model: applied, never stored.

Counts that are Poisson distributed about I + e carry F = J^T diag(1/(I + e)) J, J the derivative of
the intensities I with respect to the leaves. A complex leaf counts as its real and imaginary parts:
the inner product of tangents is Re sum conj(a) b. Tangents are shaped as the model, with None for
leaves that are held. Of the information on some directions, other leaves that are fitted along take
a part: what is left is the Schur complement F_pp - F_ps F_ss^-1 F_sp, found by conjugate gradients.

A plan is set aside: it carries no derivative with respect to optics, positions or dose, and what is
left where two of them nearly cancel does not bear its rounding of positions.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..data.counts import only
from ..data.dataset import Mask


FLOOR = 1e-5
"""A combination that keeps less than this of its information counts as undetermined: its error is
more than 300 times what it would be were all else known, and float32 does not tell it from none."""

WATCHED = 10
"""Steps of conjugate gradients whose common gain is taken for what is still to come."""

Index = Int[Array, " frames"] | Int[np.ndarray, " frames"]
"""Numbers of frames."""


class Rows(NamedTuple):
    """Frames cut into rows; where they do not fill the last one, it repeats a frame uncounted.

    Pixels at which `mask` is False carry no information.
    """

    frames: Int[Array, "rows chunk"]
    counted: Float[Array, "rows chunk"]
    mask: Mask = None


def fisher_product(
    model: PyTree, index: Index, tangent: PyTree, *, chunk: int = 64, background: float = 0.002,
    mask: Mask = None,
) -> PyTree:  # fmt: skip
    """F v of the frames `index` for a `tangent` v, in the same shape.

    Sums over `chunk` frames at a time. `background` is that of `losses.poisson`, electrons a pixel;
    `mask` that of the dataset.

    **Raises:** ValueError for no frames, or a tangent that is not shaped as the model.
    """
    plain, tangent = without_plan(model), without_plan(tangent)
    require_shape_of_model("`fisher_product`: `tangent`", plain, tangent)
    return information(plain, rows_of(index, chunk, mask), background, tangent)


@eqx.filter_jit
def information(model: PyTree, rows: Rows, background: float, tangent: PyTree) -> PyTree:
    """F v summed over `rows`, of a model without plan."""
    moved, still = eqx.partition(model, jax.tree.map(is_given, tangent, is_leaf=is_none))
    tangent = jax.tree.map(lambda leaf, t: jnp.asarray(t, leaf.dtype), moved, tangent)
    seen = None if rows.mask is None else rows.mask[None]

    def add(total, row):
        index, counted = row
        expected = lambda moved: eqx.combine(moved, still)(index)
        intensity, pull = jax.vjp(expected, moved)
        weight = counted[:, None, None].astype(intensity.dtype) / (intensity + background)
        weight = only(weight, seen)
        (back,) = pull(weight * push(pull, intensity, tangent))
        # JAX's cotangent of a complex leaf is the conjugate of the gradient.
        return jax.tree.map(lambda a, b: a + jnp.conj(b), total, back), None

    start = jax.tree.map(jnp.zeros_like, moved)
    return jax.lax.scan(add, start, (rows.frames, rows.counted))[0]


@eqx.filter_jit
def position_information(model: PyTree, rows: Rows, background: float) -> Float[Array, "..."]:
    """The 2 x 2 information (1/Å²) of each frame in `rows` on its own position (y, x)."""
    seen = None if rows.mask is None else rows.mask[None]

    def row(index):
        def expected(positions):
            return eqx.tree_at(lambda m: m.scan.positions, model, positions)(index)

        positions = model.scan.positions
        intensity, pull = jax.vjp(expected, positions)
        root = jnp.sqrt(intensity + background)
        # Frames do not feel each other's positions, so that all move at once.
        units = [jnp.zeros_like(positions).at[:, axis].set(1) for axis in (0, 1)]
        slopes = [push(pull, intensity, unit) / root for unit in units]
        slopes = jnp.stack([only(slope, seen) for slope in slopes])
        return jnp.einsum("afyx,bfyx->fab", slopes, slopes, precision="highest")

    return jax.lax.map(row, rows.frames)


def push(pull: Any, intensity: Float[Array, "*shape"], tangent: PyTree) -> Float[Array, "*shape"]:
    """J v as the transpose of the transpose: models may have rules for the reverse pass alone."""
    return jax.vjp(pull, jnp.zeros_like(intensity))[1]((tangent,))[0]


class Nuisance(NamedTuple):
    """Leaves fitted along (those with a label), and what is known of them without the data.

    Tangents of them are kept in units of `scale`, one a leaf; `belief` is 1 where that is the
    standard deviation believed of its entries, and 0 where nothing is believed.
    """

    model: PyTree
    rows: Rows
    background: float
    labels: PyTree
    scale: PyTree
    belief: PyTree
    project: dict[str, Callable[[Array], Array]]

    def settled(self, tangent: PyTree) -> PyTree:
        """`tangent` within the projections, times the scales: a symmetric map."""

        def settle(name, scale, leaf):
            if name in self.project:
                # The derivative of an affine map is its linear part.
                leaf = jax.jvp(self.project[name], (leaf,), (leaf,))[1]
            return leaf * scale.astype(leaf.dtype)

        return jax.tree.map(settle, self.labels, self.scale, tangent)

    def believed(self, taken: PyTree) -> PyTree:
        """The information of the beliefs, applied."""
        return jax.tree.map(lambda b, u: b.astype(u.dtype) * u, self.belief, taken)


def nuisance_of(
    model: PyTree,
    rows: Rows,
    background: float,
    labels: PyTree,
    project: Mapping[str, Callable[[Array], Array]],
    prior: Mapping[str, float],
) -> Nuisance:
    """The leaves of `model` that have a label (a name of `prior` or `project`, or another).

    Where nothing is believed of a leaf its unit is that of its best known combination of entries:
    conjugate gradients want the same for all.
    """
    names, structure = jax.tree.flatten(labels, is_leaf=is_none)
    scale: list[Array | None] = [None] * len(names)
    for i, name in enumerate(names):
        if name in prior:
            scale[i] = jnp.asarray(prior[name], float)
        elif name is not None:
            alone = eqx.filter(model, structure.unflatten([i == j for j in range(len(names))]))
            most = _largest(model, rows, background, alone)
            scale[i] = jnp.where(most > 0, most, jnp.ones_like(most)) ** -0.5
    belief = [None if name is None else jnp.asarray(name in prior, float) for name in names]
    parts = (structure.unflatten(scale), structure.unflatten(belief))
    return Nuisance(model, rows, background, labels, *parts, {**project})


@eqx.filter_jit
def _largest(model, rows, background, leaf) -> Float[Array, ""]:
    """About the largest eigenvalue of the information on a leaf, by power iteration."""
    start = jax.tree.map(lambda a: jax.random.normal(jax.random.key(0), a.shape, a.dtype), leaf)

    def step(_, state):
        vector, size = state
        size = jnp.where(size > 0, size, jnp.ones_like(size))
        vector = jax.tree.map(lambda a: a / size.astype(a.dtype), vector)
        vector = information(model, rows, background, vector)
        return vector, jnp.sqrt(inner(vector, vector))

    return jax.lax.fori_loop(0, 10, step, (start, jnp.sqrt(inner(start, start))))[1]


@eqx.filter_jit
def absorb(
    nuisance: Nuisance,
    rest: PyTree,
    felt: PyTree,
    taken: PyTree,
    belief: Float[Array, ""],
    iterations: Int[Array, ""],
    tolerance: Float[Array, ""],
) -> tuple[PyTree, PyTree, Bool[Array, ""]]:
    """What is left of a move and what is taken, when most of it is, and if that was cut short.

    Starts from a `rest` left and F rest = `felt`, with u = `taken` already. Minimises
    <m - s u, F (m - s u)> + <u, u>, the second term where u is believed: the minimum is the Schur
    complement, any other u leaves more. `belief` is information, relative to that on m alone, that
    nothing can take. Ends when less than `tolerance` of what is left seems to come, or where
    no more than `FLOOR` is.
    """

    def operator(u):
        settled = nuisance.settled(u)
        pushed = information(nuisance.model, nuisance.rows, nuisance.background, settled)
        return jax.tree.map(jnp.add, nuisance.settled(pushed), nuisance.believed(u))

    held = nuisance.believed(taken)
    right = nuisance.settled(labelled(nuisance.labels, felt))
    residual = jax.tree.map(jnp.subtract, right, held)
    square = inner(residual, residual)
    left = inner(rest, felt) + inner(taken, held) + belief.astype(square.dtype)
    gains = jnp.full(WATCHED, jnp.inf, square.dtype)

    def more(state):
        *_, square, gains, left = state
        coming = jnp.sum(gains) > tolerance.astype(left.dtype) * left
        return (square > 0) & (left > FLOOR / 2) & coming

    def step(state):
        u, residual, search, square, gains, left = state
        pushed = operator(search)
        bend = inner(search, pushed)
        # Rounding may leave a search along which nothing is known.
        length = jnp.where(bend > 0, square / bend, jnp.zeros_like(bend))
        u, residual = plus(u, length, search), plus(residual, -length, pushed)
        following = inner(residual, residual)
        search = plus(residual, following / square, search)
        gains = jnp.roll(gains, 1).at[0].set(length * square)
        return u, residual, search, following, gains, left - length * square

    count, state = jax.lax.while_loop(
        lambda s: (s[0] < iterations) & more(s[1]),
        lambda s: (s[0] + 1, step(s[1])),
        (jnp.zeros_like(iterations), (taken, residual, residual, square, gains, left)),
    )
    new = nuisance.settled(jax.tree.map(jnp.subtract, state[0], taken))
    rest = jax.tree.map(lambda n, r: r if n is None else r - n, new, rest, is_leaf=is_none)
    return rest, state[0], more(state)


def rows_of(index: Index, chunk: int, mask: Mask = None) -> Rows:
    """`index` in rows of at most `chunk` frames, of which the pixels in `mask` count.

    **Raises:** ValueError if there is no frame.
    """
    index = np.asarray(index)
    if chunk < 1 or len(index) == 0:
        raise ValueError(
            f"Fisher information needs at least one frame and a `chunk` of at least one, got "
            f"{len(index)} frames and `chunk` {chunk}."
        )
    width = min(chunk, len(index))
    shape = (-(-len(index) // width), width)
    filled = np.resize(index, shape)
    counted = np.arange(filled.size).reshape(shape) < len(index)
    seen = None if mask is None else jnp.asarray(mask)
    return Rows(jnp.asarray(filled, jnp.int32), jnp.asarray(counted, float), seen)


def without_plan(tree: PyTree) -> PyTree:
    """A model, or a tangent of it, without its plan."""
    if getattr(tree, "plan", None) is None:
        return tree
    return eqx.tree_at(lambda m: m.plan, tree, None)


def is_none(leaf: Any) -> bool:
    """True for None, which JAX otherwise takes for a tree without leaves."""
    return leaf is None


def labelled(labels: PyTree, tangent: PyTree) -> PyTree:
    """The leaves of `tangent` that have a label; None for the others."""
    keep = lambda label, leaf: None if label is None else leaf
    return jax.tree.map(keep, labels, tangent, is_leaf=is_none)


def is_given(leaf: Any) -> bool:
    """False for None."""
    return leaf is not None


@jax.jit
def inner(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Re sum conj(a) b over all leaves."""
    parts = jax.tree.map(lambda x, y: jnp.sum(jnp.real(jnp.conj(x) * y)), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def plus(a: PyTree, factor: Float[Array, ""], b: PyTree) -> PyTree:
    """a + `factor` b."""
    return jax.tree.map(lambda x, y: x + factor.astype(y.dtype) * y, a, b)


@jax.jit
def combination(factors: Float[Array, " n"], parts: list[PyTree]) -> PyTree:
    """Sum of the parts, each times its factor."""

    def add(*leaves):
        return sum(f.astype(a.dtype) * a for f, a in zip(factors, leaves, strict=True))

    return jax.tree.map(add, *parts)


def require_shape_of_model(what: str, model: PyTree, tangent: PyTree) -> None:
    """Refuse a tangent that is not shaped as the model.

    **Raises:** ValueError that begins with `what`.
    """
    structure = partial(jax.tree.structure, is_leaf=is_none)
    if structure(model) != structure(tangent):
        raise ValueError(
            f"{what} must be shaped as the model, with None for leaves that are held; make it by "
            f"`equinox.tree_at` from zeros of the model. Got {structure(tangent)} for "
            f"{structure(model)}."
        )
