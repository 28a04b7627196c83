"""What a reader of a calibration should not miss, in words."""

import math
from collections.abc import Sequence

import numpy as np

from ..data.calibration import Disc, LensFit


def about_discs(discs: Sequence[Disc]) -> list[str]:
    notes = []
    radii = [disc.radius for disc in discs]
    if max(radii) - min(radii) > 0.02 * max(radii):
        notes.append(
            f"the discs differ in radius, {min(radii):.2f} to {max(radii):.2f} pixels: was the "
            "camera length or the aperture changed between the scans?"
        )
    apart = np.ptp([disc.center for disc in discs], axis=0)
    if apart.max() > 0.5:
        notes.append(
            f"the discs' centres differ by {apart[0]:.2f}, {apart[1]:.2f} pixels; an experiment "
            "has one centre: centre the scans first, or calibrate them one by one"
        )
    distortion = float(np.mean([math.hypot(*disc.ellipse) for disc in discs]))
    if distortion > 0.01:
        notes.append(
            f"the disc is elliptical by ±{100 * distortion:.1f} %: a distortion of the "
            "camera, which the model knows only as astigmatism"
        )
    return notes


def about_lens(lens: LensFit, orientations, known, shifts, semiangle, defoci) -> list[str]:
    """What a reader of the calibration should not miss."""
    notes = []
    if lens.explains < 0.05:
        notes.append(
            f"the fit explains {100 * lens.explains:.1f} % of the bright-field images only; look "
            "at the pictures before you trust rotation and defocus"
        )
    if lens.other > 0.9:
        notes.append(
            f"the other transposition fits {100 * lens.other:.0f} % as well; give --transpose or "
            "--no-transpose"
        )
    if lens.decided == "phase and lost electrons" and abs(lens.sign) < 0.1:
        notes.append(
            "the sign of the defocus is not certain (rotation plus 180° with the opposite defocus "
            "fits as well); give the nominal --defocus"
        )
    surest = min(orientations, key=lambda found: found.sigma)
    turned = float(lens.lens.rotation) - surest.rotation
    turned = (turned + math.pi / 2) % math.pi - math.pi / 2
    if surest.curl < 0.2 and (
        surest.transpose != lens.transpose or abs(turned) > 4 * surest.sigma + math.radians(2)
    ):
        notes.append(
            f"the curl of the centre of mass says {math.degrees(surest.rotation):.1f} ± "
            f"{math.degrees(surest.sigma):.1f}° (modulo 180°), transpose: {surest.transpose}, "
            "which is not what the bright-field images say"
        )
    for pair, defocus in zip(shifts, defoci, strict=True):
        if pair is not None and abs(abs(pair[1].defocus) / abs(defocus) - 1) > 0.1:
            notes.append(
                f"from displacements alone the defocus is {abs(pair[1].defocus):.4g} Å, not "
                f"{abs(defocus):.4g}"
            )
    return notes
