"""Least squares that does not listen to outliers."""

import numpy as np
from jaxtyping import Float


def biweight(
    basis: Float[np.ndarray, "points terms"], values: Float[np.ndarray, "points columns"]
) -> tuple[
    Float[np.ndarray, "terms columns"],
    Float[np.ndarray, " points"],
    Float[np.ndarray, " points"],
]:
    """Linear fit, weight of each point (0 to 1), and its distance from the fit.

    Tukey's biweight, cut off at 4.685 times the spread that the median distance stands for, by
    repeated least squares.
    """
    spread_of_median = 0.6745 if values.shape[1] == 1 else 1.1774  # of a normal distribution
    weight = np.ones(len(basis))
    fit, distance = np.zeros((basis.shape[1], values.shape[1])), np.zeros(len(basis))
    for _ in range(20):
        root = np.sqrt(weight)[:, None]
        fit = np.linalg.lstsq(basis * root, values * root, rcond=None)[0]
        distance = np.linalg.norm(values - basis @ fit, axis=1)
        scale = max(float(np.median(distance)) / spread_of_median, 1e-6)
        weight = np.clip(1 - (distance / (4.685 * scale)) ** 2, 0, None) ** 2
    return fit, weight, distance
