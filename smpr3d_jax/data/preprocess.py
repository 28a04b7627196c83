"""From what a camera writes to counts that a model may be compared with: every step, in one place.

1. `corrected`, `thresholds_of`, `count_electrons`: raw frames to single electrons; or
   `photon_transfer`, `to_electrons`: an integrating camera's counts to whole electrons.
2. `pixel_statistics`, `bad_pixels`: a mask of pixels that must not be used. They are left out of
   the comparison, never repaired.
3. `descan_of`, `without_descan`: every frame to one place, by whole pixels.
4. `ellipse_of_disc`, `ellipse_of_ring`, `moved_electrons`: a distorted camera made round.
5. `padded`, `binned_mask`, and `crop` and `bin_detector` of `electrons`: another window.

Arrays are numpy's, in blocks of frames of any size; counts stay whole numbers and Poisson's.
"""

from .alignment import (
    binned_mask as binned_mask,
    Descan as Descan,
    descan_of as descan_of,
    padded as padded,
    seen_by_all as seen_by_all,
    without_descan as without_descan,
)
from .counting import (
    Background as Background,
    background_of as background_of,
    corrected as corrected,
    count_electrons as count_electrons,
    Counted as Counted,
    overlap as overlap,
    Thresholds as Thresholds,
    thresholds_of as thresholds_of,
)
from .distortion import (
    Ellipse as Ellipse,
    ellipse_of_disc as ellipse_of_disc,
    ellipse_of_ring as ellipse_of_ring,
    moved_electrons as moved_electrons,
    moved_mask as moved_mask,
)
from .gain import (
    Gain as Gain,
    pair_statistics as pair_statistics,
    photon_transfer as photon_transfer,
    rounding_noise as rounding_noise,
    to_electrons as to_electrons,
)
from .pixels import (
    bad_pixels as bad_pixels,
    BadPixels as BadPixels,
    pixel_statistics as pixel_statistics,
    PixelStatistics as PixelStatistics,
)
