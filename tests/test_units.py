"""However a file writes a unit, the number comes out in ours."""

import math

import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers.units import (
    axes_facts,
    check_order,
    ENERGIES,
    sampling,
    scaled,
    step_of,
    zero_of,
)


@pytest.mark.parametrize(
    "space, step, unit, expected",
    [
        *(("R", 0.2, unit, ("scan_step_A", 0.2)) for unit in ("A", "Å", "\u212b", "Angstroms")),
        *(("R", 0.2, unit, ("scan_step_A", 2.0)) for unit in ("nm", "[n_m]", " nanometer ")),
        *(("R", 1e-3, unit, ("scan_step_A", 10.0)) for unit in ("um", "µm", "μm", "[u_m]")),
        ("R", 20.0, "pm", ("scan_step_A", 0.2)),
        ("R", 2e-11, "m", ("scan_step_A", 0.2)),
        *(
            ("Q", 0.2, unit, ("detector_pixel_inv_A", 0.2))
            for unit in ("A^-1", "1/A", "Å⁻¹", "$A^{-1}$", "1 / Å", "[1/Å]", "A-1", "1/Angstrom")
        ),
        *(
            ("Q", 0.2, unit, ("detector_pixel_inv_A", 0.02))
            for unit in ("nm^-1", "1/nm", "[n_m^-1]", "(1/nm)", "nm⁻¹", "$nm^{-1}$")
        ),
        ("Q", 1.5, "mrad", ("detector_pixel_mrad", 1.5)),
        ("Q", 1.5e-3, "rad", ("detector_pixel_mrad", 1.5)),
        ("Q", 0.1, "degrees", ("detector_pixel_mrad", math.radians(0.1) * 1e3)),
        *(("R", 0.2, unit, None) for unit in ("pixels", "px", "", None, "mrad", "1/nm", "_None_")),
        *(("Q", 0.2, unit, None) for unit in ("pixels", "nm", "", None, "s")),
        *(("R", step, "nm", None) for step in (None, 0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_sampling(space, step, unit, expected):
    found = sampling(space, step, unit)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found == (expected[0], pytest.approx(expected[1]))


def test_axes():
    scan, detector = [(0.2, "nm"), (3.0, "A")], [(1.5, "mrad"), (2e-3, "rad")]
    facts = {"scan_step_A": (2.0, 3.0), "detector_pixel_mrad": (1.5, 2.0)}
    assert axes_facts(scan + detector) == facts
    assert axes_facts([(None, None), *detector]) == {"detector_pixel_mrad": (1.5, 2.0)}
    assert axes_facts([(0.2, "nm"), (3.0, "px"), (1.5, "mrad"), (0.1, "1/nm")]) == {}


@pytest.mark.parametrize("units", [["1/nm", "mrad", "nm", "A"], ["mrad", "mrad", "px", None]])
def test_the_detector_before_the_scan(units):
    with pytest.raises(InputError, match="a: dataset.*come before the scan"):
        check_order("a: dataset", units)
    check_order("a: dataset", units[2:] + units[:2])
    check_order("a: dataset", units[1:])


@pytest.mark.parametrize(
    "values, step",
    [
        (np.arange(4) * 0.5 - 3, 0.5),
        ([0, -2, -4], -2),
        ([0, 1, 3], None),
        ([1], None),
        ([0, math.nan, 2], None),
    ],
)
def test_even_steps(values, step):
    assert step_of(np.asarray(values, float)) == step


def test_the_zero_of_an_axis():
    assert zero_of([(-0.4, 0.2, 4), (-0.9, 0.3, 6)]) == {"center": pytest.approx((2, 3))}
    for pair in ((0.0, 0.2, 4), (0.4, 0.2, 4), (-0.8, 0.2, 4), (-0.4, None, 4), (-1.0, 1e-320, 4)):
        assert zero_of([pair, (-0.9, 0.3, 6)]) == {}
    assert zero_of([(-0.9, 0.3, 6)]) == {}


def test_quantities():
    assert scaled(80.0, "keV", ENERGIES, "eV") == scaled(8e4, None, ENERGIES, "eV") == 8e4
    for value, unit in ((None, "eV"), (0.0, "eV"), (math.nan, "eV"), (80.0, "mm")):
        assert scaled(value, unit, ENERGIES, "eV") is None
