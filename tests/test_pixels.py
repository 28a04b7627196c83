"""Bad pixels planted in scans of many doses are found, and good ones are not."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.events import event_rows
from smpr3d_jax.data.pixels import bad_pixels, pixel_statistics


SHAPE, FRAMES = (60, 72), 2000


def pattern(dose):
    """A sharp disc with speckle, `dose` electrons a pixel, and a faint tail."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    r = np.hypot(y - 29.3, x - 36.1)
    speckle = 1 + 0.3 * np.sin(x / 2.3) * np.cos(y / 3)
    return dose * ((20.5 - r).clip(0, 1) * speckle + 0.02 * np.exp(-r / 15))


def recorded(mean, seed=0):
    rng = np.random.default_rng(seed)
    return rng.poisson(np.broadcast_to(mean, (FRAMES, *SHAPE)).astype(np.float32)).astype(np.uint16)


def looked_at(frames, **how):
    return bad_pixels(pixel_statistics([Frames(frames[:999]), Frames(frames[999:])]), **how)


@pytest.mark.parametrize("kind", ["frames", "rows", "events"])
def test_statistics_are_sums_over_blocks(kind):
    cube = np.random.default_rng(0).poisson(0.7, (30, 5, 7)).astype(np.uint8)
    make = {
        "frames": Frames,
        "rows": lambda v: event_rows(Frames(v)),
        "events": lambda v: events_from_frames(Frames(jnp.asarray(v))),
    }[kind]
    seen = pixel_statistics(make(part) for part in (cube[:11], cube[11:]))
    assert seen.frames == 30
    np.testing.assert_array_equal(seen.total, cube.sum(0, dtype=int))
    np.testing.assert_array_equal(seen.square, (cube.astype(int) ** 2).sum(0))
    mean = cube.mean(0)
    truth = cube.var(0, ddof=1) / np.where(mean > 0, mean, 1)
    np.testing.assert_allclose(seen.fano, truth, atol=1e-12)
    with pytest.raises(InputError, match="no frames"):
        pixel_statistics([])


@pytest.mark.parametrize("dose", [0.02, 0.5, 20.0])
def test_a_good_camera_has_no_bad_pixels(dose):
    """Sharp edges, speckle, and whatever Poisson statistics do."""
    found = [looked_at(recorded(pattern(dose), seed)) for seed in (1, 2)]
    assert sum(np.count_nonzero(~f.mask) for f in found) == 0


@pytest.mark.parametrize("dose", [0.02, 0.5, 20.0])
def test_planted_pixels_are_found(dose):
    mean = pattern(dose)
    mean[20, 30] = 4 * dose + 0.05
    mean[5, 60] = max(0.05, dose)
    mean[25, 50] *= 0.1
    mean[12:15, 40:43] = 0
    cluster = [40, 41, 41], [36, 36, 37]
    mean[cluster] = 4 * dose
    frames = recorded(mean)
    frames[:, 33, :] = 0
    found = looked_at(frames)
    hot, dead = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    hot[20, 30] = hot[5, 60] = hot[cluster] = True
    dead[25, 50] = dead[33, 16:56] = dead[12:15, 40:43] = True
    certain = (
        hot if dose > 0.1 else hot & (np.indices(SHAPE)[0] != 41) & (np.indices(SHAPE)[0] != 40)
    )
    assert np.all(found.hot[certain]) and not np.any(found.hot & ~hot)
    inner = dead.copy()
    inner[33, :18] = inner[33, 54:] = False
    assert np.mean(found.dead[inner]) > (0.85 if dose < 0.1 else 0.99)
    allowed = dead.copy()
    allowed[33] = True
    assert not np.any(found.dead & ~allowed)
    assert not found.flickering.any()
    np.testing.assert_array_equal(found.mask, ~(found.hot | found.dead))


def test_a_flickering_pixel_of_the_right_mean():
    mean = pattern(0.5)
    frames = recorded(mean)
    rng = np.random.default_rng(3)
    bursts = (rng.random(FRAMES) < 0.01) * rng.poisson(50 * mean[30, 40], FRAMES)
    frames[:, 30, 40] = rng.poisson(mean[30, 40] / 2, FRAMES) + bursts
    found = looked_at(frames)
    assert np.argwhere(~found.mask).tolist() == [[30, 40]] and found.flickering[30, 40]


def test_known_pixels_are_left_out_and_frames_brighten_together():
    """A hot block is hidden from the neighbours; a beam that changes makes no pixel flicker."""
    mean = pattern(0.5)
    mean[30:34, 30:34] = 100
    frames = recorded(mean)
    mask = np.ones(SHAPE, bool)
    mask[30:34, 30:34] = False
    assert np.all(looked_at(frames, mask=mask).mask)
    pulse = np.where(np.arange(FRAMES) % 50 == 0, 20.0, 0.5)[:, None, None]
    changing = np.random.default_rng(1).poisson(pulse * pattern(0.5)).astype(np.uint16)
    assert np.all(looked_at(changing).mask)
    with pytest.raises(InputError, match="`excess` is a ratio above 1"):
        looked_at(frames[:2000], excess=0.5)
