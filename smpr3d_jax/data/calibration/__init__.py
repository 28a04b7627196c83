"""What a series says about the microscope: each measurement a function, with its standard error.

In the order of use: `find_charge` on frames as they are, `find_disc` on a mean pattern,
`gather_signals` in one pass over the frames, `step_from_lattice` where a crystal is seen, then
`find_orientation` from the deflection of the beam, `fit_lens` from the bright-field images of all
scans together, and `measure_shifts` with `fit_shifts` as an independent check of it.
"""

from .charge import (
    Charge as Charge,
    find_charge as find_charge,
    whole_electrons as whole_electrons,
)
from .disc import Disc as Disc, find_disc as find_disc
from .lattice import (
    power_spectrum as power_spectrum,
    ScanStep as ScanStep,
    step_from_lattice as step_from_lattice,
)
from .lens import fit_lens as fit_lens, LensFit as LensFit
from .orientation import find_orientation as find_orientation, Orientation as Orientation
from .overlap import (
    contrast as contrast,
    explained as explained,
    Lens as Lens,
    Overlaps as Overlaps,
    overlaps as overlaps,
)
from .shifts import (
    fit_shifts as fit_shifts,
    measure_shifts as measure_shifts,
    ShiftFit as ShiftFit,
    Shifts as Shifts,
)
from .signals import gather_signals as gather_signals, Signals as Signals
