"""The public names, each once; `__init__.py` imports the module of one when it is asked for."""

from .app import (
    calibration_page as calibration_page,
    experiment as experiment,
    outputs as outputs,
    workflow as workflow,
)
from .app.calibrate import calibrate as calibrate, Calibration as Calibration
from .app.simulate import (
    Acquisition as Acquisition,
    read_structure as read_structure,
    simulate as simulate,
    two_nanotubes as two_nanotubes,
    write_series as write_series,
)
from .data import (
    calibration as calibration,
    electrons as electrons,
    interchange as interchange,
    preprocess as preprocess,
    readers as readers,
)
from .data.counts import (
    compare as compare,
    Events as Events,
    events_from_csr as events_from_csr,
    events_from_frames as events_from_frames,
    Frames as Frames,
    InputError as InputError,
    thin as thin,
    to_corner as to_corner,
)
from .data.dataset import (
    Batch as Batch,
    batch as batch,
    Dataset as Dataset,
    hold_out as hold_out,
    join as join,
    subset as subset,
)
from .data.events import (
    event_rows as event_rows,
    EventRows as EventRows,
    to_events as to_events,
    to_frames as to_frames,
)
from .data.readers import read as read, read_series as read_series, Source as Source
from .inverse import (
    constraints as constraints,
    design as design,
    dpc as dpc,
    losses as losses,
    penalties as penalties,
    pie as pie,
    planning as planning,
    priors as priors,
    refinement as refinement,
    transfer as transfer,
    updates as updates,
    virtual as virtual,
)
from .inverse.brightfield import bright_field as bright_field, BrightField as BrightField
from .inverse.epochs import reconstruct_in_epochs as reconstruct_in_epochs
from .inverse.exchange import exchange_of as exchange_of, model_of as model_of
from .inverse.parallax import parallax as parallax
from .inverse.rasters import Raster as Raster, raster_of as raster_of
from .inverse.reconstruction import (
    make_evaluation as make_evaluation,
    make_step as make_step,
    reconstruct as reconstruct,
    Result as Result,
    Step as Step,
)
from .inverse.resolution import ring_correlation as ring_correlation
from .inverse.sections import (
    depth_sections as depth_sections,
    diagonal_gauge as diagonal_gauge,
    Gauge as Gauge,
    section_blocks as section_blocks,
    virtual_images as virtual_images,
)
from .inverse.seeds import slices_from_phase as slices_from_phase
from .inverse.ssb import ssb as ssb
from .inverse.structure import (
    fit_structure as fit_structure,
    layers_from_sections as layers_from_sections,
)
from .inverse.uncertainty import (
    bootstrap as bootstrap,
    laplace as laplace,
    position_errors as position_errors,
)
from .inverse.unfolding import Focused as Focused
from .inverse.wigner import wdd as wdd
from .physics import limits as limits
from .physics.coherence import orthogonal_probes as orthogonal_probes
from .physics.detector import annulus as annulus, Detector as Detector
from .physics.forward import (
    exit_waves as exit_waves,
    prepare as prepare,
    Scattering as Scattering,
    unscattered as unscattered,
)
from .physics.grid import Grid as Grid
from .physics.layers import Layers as Layers
from .physics.optics import (
    aberration_phase as aberration_phase,
    aberration_shift as aberration_shift,
    aperture as aperture,
    cartesian as cartesian,
    chromatic_spread as chromatic_spread,
    focal_series as focal_series,
    interaction_parameter as interaction_parameter,
    Optics as Optics,
    polar as polar,
    probe as probe,
    wavelength as wavelength,
)
from .physics.propagation import (
    fresnel as fresnel,
    multislice as multislice,
    transmission as transmission,
)
from .physics.ptychography import (
    empty_object as empty_object,
    Illumination as Illumination,
    ObjectSlices as ObjectSlices,
    pixel_probes as pixel_probes,
)
from .physics.scan import raster as raster, Scan as Scan, series_of as series_of
from .physics.simulation import (
    count_electrons as count_electrons,
    simulate_series as simulate_series,
)
from .physics.smatrix import (
    Beams as Beams,
    field as field,
    scatter as scatter,
    TiltModes as TiltModes,
    to_beams as to_beams,
    to_modes as to_modes,
    unscattered_beams as unscattered_beams,
    unscattered_modes as unscattered_modes,
)
from .physics.specimen import Slices as Slices, slices_from_atoms as slices_from_atoms
from .report import figures as figures

__version__: str
