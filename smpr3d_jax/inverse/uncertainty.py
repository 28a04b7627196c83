"""How well the counts determine what was fitted.

`laplace` takes the inverse of the Fisher information for the covariance of a fit by the Poisson
loss: right where the model holds and the errors are small enough for it to be linear. `bootstrap`
takes the scatter of results from halves of the electrons: right where the result is linear in the
counts, whatever made it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ..data.counts import thin
from ..data.dataset import Dataset, Mask
from ..data.electrons import masked
from .fisher import (
    absorb,
    combination,
    FLOOR,
    Index,
    information,
    inner,
    is_given,
    is_none,
    labelled,
    Nuisance,
    nuisance_of,
    position_information,
    require_shape_of_model,
    rows_of,
    without_plan,
)
from .updates import per_leaf


ROUNDS = 3
"""How often combinations of coordinates that keep little are searched for and by themselves."""


class Covariance(NamedTuple):
    """Covariance of coordinates, in the product of their units, and the roots of its diagonal.

    `undetermined` lists the combinations that the data leave open, as coefficients by name. The
    coordinates that take part in one have infinite standard errors, while `matrix` still holds for
    every combination that does not change along them, such as differences of defoci. For the
    coordinates named in `unfinished` the errors are lower bounds: allow more iterations.
    """

    names: tuple[str, ...]
    matrix: Float[np.ndarray, "names names"]
    standard_errors: dict[str, float]
    undetermined: tuple[dict[str, float], ...] = ()
    unfinished: tuple[str, ...] = ()


class Bootstrap(NamedTuple):
    """Mean over the halves of the counts, and the standard error of the result of all counts."""

    mean: Float[np.ndarray, "..."]
    standard_error: Float[np.ndarray, "..."]


def laplace(
    model: PyTree,
    index: Index,
    directions: Mapping[str, PyTree],
    *,
    nuisance: Sequence[str] = (),
    project: Mapping[str, Callable[[Array], Array]] | None = None,
    prior: Mapping[str, float] | None = None,
    chunk: int = 64,
    background: float = 0.002,
    mask: Mask = None,
    iterations: int = 200,
    tolerance: float = 0.01,
) -> Covariance:
    """Covariance of the coordinates along `directions`, `model` being the fit to frames `index`.

    Information that leaves fitted along could also explain is taken out by conjugate gradients:
    F_pp - F_ps (F_ss + 1/s²)^-1 F_sp, the Schur complement, s being what is believed of them. An
    iteration takes, for each coordinate, a forward and two reverse passes of the exact model.

    **Arguments:** `directions` are tangents of the model by name, each its change for a unit of the
    coordinate (None or zero where nothing moves). `nuisance` names the leaves fitted along, such as
    `specimen.waves`, and `project` the orthogonal projections, linear or affine, that the fit
    applied to them (`priors.depth_range`): without it S can take up every aberration common to all
    scans. `prior` are standard deviations believed beforehand, by name: of coordinates, and of the
    entries of a leaf fitted along, of their real and imaginary parts (even a wide one says much
    where many entries change together; by default nothing is believed). `mask` is that of the
    dataset. Iterations end where less than `tolerance` of the variance seems to come, or after
    `iterations`.

    **Raises:** ValueError for names that fit nothing, a tangent of another shape or without any
    change, or a standard deviation that is not positive.
    """
    project, prior = project or {}, prior or {}
    _require(directions, nuisance, project, prior)
    plain, rows = without_plan(model), rows_of(index, chunk, mask)
    labels = _labels(tuple(nuisance), plain)
    moves = _moves(plain, directions, labels)
    response = partial(information, plain, rows, background)
    felt = [response(move) for move in moves]
    belief = np.asarray([prior.get(name, np.inf) ** -2.0 for name in directions])
    known = np.diag(_products(moves, felt)) + belief
    size = np.where(known > 0, np.sqrt(known), 1.0)
    # From here on each coordinate has the information 1 were all else known.
    unit, belief = np.diag(1 / size), np.diag(belief / size**2)
    state = _Search(_combined(unit, moves), _combined(unit, felt), [], belief, np.eye(len(moves)))
    if not nuisance:
        schur = belief + _products(state.rest, state.felt)
        return _covariance(tuple(directions), size, schur, ())
    along = nuisance_of(plain, rows, background, labels, project, prior)
    schur, cut = _without(along, state, response, iterations, tolerance)
    short = tuple(n for n, part in zip(directions, cut, strict=True) if part)
    return _covariance(tuple(directions), size, schur, short)


class _Search(NamedTuple):
    """Combinations of coordinates (rows of `turn`): what is left of their moves, and taken.

    `felt` is the information applied to `rest`; `belief` is that believed of the combinations.
    """

    rest: list[PyTree]
    felt: list[PyTree]
    taken: list[PyTree]
    belief: Float[np.ndarray, "n n"]
    turn: Float[np.ndarray, "n n"]

    def turned(self, by: Float[np.ndarray, "n n"]) -> "_Search":
        """The combinations of these combinations."""
        rest, felt, taken = (_combined(by, part) for part in self[:3])
        return _Search(rest, felt, taken, by @ self.belief @ by.T, by @ self.turn)


def _without(along: Nuisance, state: _Search, response, iterations: int, tolerance: float):
    """The information without that on the leaves fitted along, and who was cut short in the search.

    What a combination of coordinates keeps may be far less than the error of what each keeps:
    combinations that seem to keep little are searched again by themselves.
    """
    limits = jnp.asarray(iterations), jnp.asarray(tolerance, float)
    nothing = [jax.tree.map(jnp.zeros_like, labelled(along.labels, move)) for move in state.rest]
    state, schur, cut = state._replace(taken=nothing), state.belief, np.zeros(len(nothing))
    for _ in range(ROUNDS):
        held = [jnp.asarray(b, float) for b in np.diag(state.belief)]
        each = zip(state.rest, state.felt, state.taken, held, strict=True)
        found = [absorb(along, *one, *limits) for one in each]
        rest, taken, short = (list(part) for part in zip(*found, strict=True))
        state = state._replace(rest=rest, felt=[response(z) for z in rest], taken=taken)
        # With z what is left, <z, F z> + <u, u> errs by the square of what u lacks.
        own = state.belief + _products(state.rest, state.felt)
        own = own + _products(taken, [along.believed(u) for u in taken])
        cut = state.turn.T**2 @ np.asarray(short, float) > FLOOR
        schur = state.turn.T @ own @ state.turn
        values, vectors = np.linalg.eigh(own)
        if np.all(values > np.sort(np.diag(own)) / 2):
            break
        state = state.turned(vectors.T)
    return schur, cut


def _products(left: Sequence[PyTree], right: Sequence[PyTree]) -> Float[np.ndarray, "n n"]:
    """Inner products of all pairs, made symmetric."""
    table = np.asarray([[inner(a, b) for b in right] for a in left], float)
    return (table + table.T) / 2


def _combined(factors: Float[np.ndarray, "n n"], parts: Sequence[PyTree]) -> list[PyTree]:
    """Sums of the parts, one for each row of factors."""
    return [combination(jnp.asarray(row, float), list(parts)) for row in factors] if parts else []


def _covariance(names: tuple[str, ...], size, schur, unfinished) -> Covariance:
    """The inverse of what is kept of the information, `schur` in units of `size`, per coordinate.

    Combinations that keep less than `FLOOR` are left out and listed.
    """
    values, vectors = np.linalg.eigh(schur)
    good = values > FLOOR
    inverse = (vectors[:, good] / values[good]) @ vectors[:, good].T
    lost = vectors[:, ~good].T
    # What a lost combination, kept at the floor, would add to a variance at least doubles it.
    most = np.max(lost**2, axis=1, initial=0, keepdims=True)
    takes_part = lost**2 > np.minimum(FLOOR * np.diag(inverse), most / 2)
    errors = np.where(takes_part.any(axis=0), np.inf, np.sqrt(np.diag(inverse)) / size)
    combinations = []
    for vector, part in zip(lost / size, takes_part, strict=True):
        scaled = vector / vector[np.argmax(np.abs(vector) * part)]
        combinations.append({names[i]: float(scaled[i]) for i in np.flatnonzero(part)})
    by_name = {name: float(error) for name, error in zip(names, errors, strict=True)}
    matrix = inverse / np.outer(size, size)
    return Covariance(names, matrix, by_name, tuple(combinations), unfinished)


def position_errors(
    model: PyTree,
    index: Index,
    *,
    chunk: int = 64,
    background: float = 0.002,
    prior: float | None = None,
    mask: Mask = None,
) -> Float[np.ndarray, "frames 2 2"]:
    """Covariance (Å²) of the position (y, x) of each of the frames `index`, all else being known.

    `prior` is the standard deviation (Å) believed of each coordinate, `mask` that of the
    dataset. Where a frame leaves a direction open, as over vacuum, its variances are infinite.

    **Raises:** ValueError for no frames, or a prior that is not positive.
    """
    _require_positive("position_errors", {} if prior is None else {"prior": prior})
    found = position_information(without_plan(model), rows_of(index, chunk, mask), background)
    both = np.asarray(found, float).reshape(-1, 2, 2)[: len(index)]
    if prior is not None:
        both = both + np.eye(2) / prior**2
    values, vectors = np.linalg.eigh(both)
    lost = values[:, :1] <= FLOOR * values[:, 1:]
    covariance = np.einsum("fik,fk,fjk->fij", vectors, 1 / np.where(lost, 1.0, values), vectors)
    return np.where(lost[:, :, None], np.diag([np.inf, np.inf]), covariance)


def bootstrap(
    run: Callable[[Dataset], Any], dataset: Dataset, draws: int = 8, seed: int = 0
) -> Bootstrap:
    """Standard error of `run(dataset)`, such as sections, from runs on halves of the electrons.

    Each draw divides the electrons at random (`thin`) between two datasets and runs both. Where
    the result is linear in the counts per dose, halves have twice its variance and err
    independently: the variance is the mean of (a - b)²/4. Of the error D draws leave 1/sqrt(2 D)
    open.

    Assumed is that half the dose is as good a place to linearise as all of it. Priors and stopping
    that stay as they are weigh more on a half, so that what they suppress seems too certain. No
    difference of halves shows a bias, but one that falls as 1/dose is twice as large in them:
    `mean` less the result of all counts.

    **Raises:** ValueError if there is no draw.
    """
    if draws < 1:
        raise ValueError(f"`bootstrap` needs at least one draw, got `draws` = {draws}.")
    total, square, counted = np.zeros(()), np.zeros(()), dataset.counts
    if dataset.mask is not None:
        counted = masked(counted, dataset.mask)  # pyright: ignore
    for own in np.random.SeedSequence(seed).spawn(draws):
        halves = thin(counted, 0.5, own)
        parts = [eqx.tree_at(lambda d: d.counts, dataset, half) for half in halves]
        first, second = (np.asarray(run(part), float) for part in parts)
        total = total + (first + second) / 2
        square = square + (first - second) ** 2 / 4
    return Bootstrap(np.asarray(total / draws), np.asarray(np.sqrt(square / draws)))


def _labels(names: tuple[str, ...], model: PyTree) -> PyTree:
    """The model with each leaf replaced by the longest of `names` that leads to it, or None."""
    labels = jax.tree.map(lambda _: None, model)
    for name in sorted(names, key=len):
        own = per_leaf({name: optax.identity()}).free(model)
        name_it = lambda mine, label, name=name: name if mine else label
        labels = jax.tree.map(name_it, own, labels, is_leaf=is_none)
    return labels


def _moves(model: PyTree, directions: Mapping[str, PyTree], labels: PyTree) -> list[PyTree]:
    """The directions with zeros where another moves or a leaf is fitted along, None elsewhere."""
    tangents = {name: without_plan(direction) for name, direction in directions.items()}
    used = jax.tree.map(is_given, labels, is_leaf=is_none)
    for name, tangent in tangents.items():
        require_shape_of_model(f"`laplace`: direction {name!r}", model, tangent)
        own = jax.tree.map(_moves_leaf, model, tangent, is_leaf=is_none)
        if not any(jax.tree.leaves(own)):
            raise ValueError(f"`laplace`: direction {name!r} moves no leaf of the model.")
        used = jax.tree.map(lambda a, b: a or b, used, own)

    def filled(leaf, tangent, use):
        if not use:
            return None
        return jnp.zeros_like(leaf) if tangent is None else jnp.asarray(tangent, leaf.dtype)

    each = tangents.values()
    return [jax.tree.map(filled, model, tangent, used, is_leaf=is_none) for tangent in each]


def _moves_leaf(leaf, tangent) -> bool:
    return eqx.is_inexact_array(leaf) and tangent is not None and bool(np.any(tangent))


def _require(directions, nuisance: Sequence[str], project, prior) -> None:
    if not directions:
        raise ValueError("`laplace` needs at least one direction, got none.")
    allowed = (("prior", prior, (*directions, *nuisance)), ("project", project, nuisance))
    for argument, given, known in allowed:
        for name in given:
            if name not in known:
                raise ValueError(f"`laplace`: `{argument}` names {name!r}; known: {sorted(known)}.")
    _require_positive("laplace", prior)


def _require_positive(who: str, deviations: Mapping[str, float]) -> None:
    for name, deviation in deviations.items():
        if not 0 < deviation < np.inf:
            raise ValueError(
                f"`{who}`: the standard deviation of {name!r} must be positive and finite, got "
                f"{deviation}."
            )
