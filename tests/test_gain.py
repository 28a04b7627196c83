"""What an electron is worth: photon transfer on simulated cameras, and when to round."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.gain import pair_statistics, photon_transfer, rounding_noise, to_electrons


def camera(mean, frames=400, gain=37.0, noise=4.0, seed=0):
    rng = np.random.default_rng(seed)
    number = rng.poisson(np.broadcast_to(mean, (frames, *mean.shape[-2:])))
    return number, gain * number + rng.normal(0, noise, number.shape)


def means(shape=(50, 60)):
    return np.random.default_rng(9).gamma(1.0, 2.0, shape)


def test_pair_statistics_are_those_of_independent_parts():
    cube = np.random.default_rng(0).normal(0, 1, (21, 4, 6))
    seen = pair_statistics([cube[:11], cube[11:]])
    pairs = [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
        (8, 9),
        (11, 12),
        (13, 14),
        (15, 16),
        (17, 18),
        (19, 20),
    ]
    for part in range(4):
        own = np.array(pairs[part::4])
        assert seen.pairs[part] == len(own)
        a, b = cube[own[:, 0]], cube[own[:, 1]]
        np.testing.assert_allclose(seen.mean[part], (a + b).mean(0) / 2)
        np.testing.assert_allclose(seen.variance[part], ((a - b) ** 2).mean(0) / 2)
    summed = pair_statistics([cube], block=2)
    assert summed.mean.shape == (4, 2, 3)
    with pytest.raises(InputError, match="too few to compare"):
        pair_statistics([cube[:7]])


@pytest.mark.parametrize("frames, changing", [(400, False), (60, False), (400, True)])
def test_gain_within_its_error(frames, changing):
    """A line through noisy means would be too flat: by eight errors with 60 frames."""
    scores, noises = [], []
    for seed in range(6):
        found = photon_transfer(
            pair_statistics([camera(means(), frames, seed=seed)[1]]), None, changing
        )
        scores.append((found.counts_per_electron - 37) / found.error)
        noises.append((found.read_noise - 4) / found.read_noise_error)
        assert found.error < 0.02 * 37
    assert abs(np.mean(scores)) < 1.3 and 0.3 < np.std(scores) < 2
    assert abs(np.mean(noises)) < 1.6


def test_a_beam_that_changes_from_frame_to_frame():
    rng = np.random.default_rng(1)
    beam = rng.normal(1, 0.2, (400, 1, 1)).clip(0) * means()[None]
    values = camera(beam, 400)[1]
    seen = pair_statistics([values])
    true = photon_transfer(seen, None)
    assert abs(true.counts_per_electron - 37) < 4 * true.error
    wrong = photon_transfer(seen, None, changing=False)
    assert abs(wrong.counts_per_electron - 37) > 4 * wrong.error


def test_charge_that_spreads_is_gathered_by_blocks():
    number, values = camera(np.kron(means((16, 16)), np.ones((8, 8))), 120, noise=0.0)
    spread = 0.6 * values + 0.1 * sum(np.roll(values, s, a) for s in (1, -1) for a in (1, 2))
    single, block = (photon_transfer(pair_statistics([spread], b)) for b in (1, 4))
    assert single.counts_per_electron < 0.5 * 37
    assert 0.8 * 37 < block.counts_per_electron < 37


def test_too_little_to_see():
    with pytest.raises(InputError, match="do not determine a line"):
        photon_transfer(pair_statistics([camera(means((10, 12)))[1]]))
    with pytest.raises(InputError, match="does not rise"):
        falling = np.random.default_rng(0).normal(means(), 10 / (1 + means()), (100, 50, 60))
        photon_transfer(pair_statistics([falling]))


@pytest.mark.parametrize("noise", [0.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_rounding_gives_the_electrons_back(noise, dtype):
    number, values = camera(means(), 20, noise=noise)
    found = to_electrons((np.rint(values) if dtype is np.int32 else values).astype(dtype), 37.0)
    assert found.dtype == np.uint16
    assert np.mean(found != number) < 1e-3
    assert rounding_noise(values, 37.0) == pytest.approx(noise / 37, abs=0.01)


def test_frames_below_zero_are_no_electrons():
    """A dark reference that is too large hides electrons; one broken pixel hides only itself."""
    number, values = camera(means() / 10, 20, noise=2.0)
    with pytest.raises(InputError, match="dark reference"):
        to_electrons(values - 37.0, 37.0)
    values[:, 3, 4] = -1e4
    found = to_electrons(values, 37.0)
    assert not found[:, 3, 4].any()
    found[:, 3, 4] = number[:, 3, 4]
    assert np.mean(found != number) < 1e-3


def test_counts_that_cannot_be_told_are_refused():
    number, values = camera(means() / 50, 20, noise=1.0)
    for factor, noise in ((37.0, 12.0), (37.0 * 2, 0.0), (37.0 * 1.5, 0.0)):
        frames = 37.0 * number + np.random.default_rng(0).normal(0, noise, number.shape)
        with pytest.raises(InputError, match="from whole numbers, more than 0.17"):
            to_electrons(frames, factor)
    for factor in (0.0, -3.0, float("nan")):
        with pytest.raises(InputError, match="a positive number is needed"):
            to_electrons(values, factor)
    values[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not a number"):
        to_electrons(values, 37.0)
    large = np.full((1, 2, 3), 1e5)
    assert to_electrons(large, 1.0).dtype == np.uint32
    with pytest.raises(InputError, match="too small"):
        to_electrons(large * 1e6, 1.0)
