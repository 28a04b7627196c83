"""Writers of small files in the cameras' own formats, made from their descriptions alone."""

import numpy as np


def save_empad(path, cube, xml=None):
    """Frames with the footer of an EMPAD; `xml` is what its description says, from `empad_xml`."""
    frames = cube.reshape(-1, 128, 128)
    records = np.full((len(frames), 130, 128), np.nan, "<f4")
    records[:, :128] = frames
    records[:, 128:] = -np.arange(1, len(frames) + 1)[:, None, None]
    path.write_bytes(records.tobytes())
    if xml is not None:
        path.with_name("scan.xml").write_text(xml)
    return path


def empad_xml(raw, scan, size=1.0, step=3.0, more="", search=(64, 64)):
    """A description as software 1.2.2 of the instrument writes it; `step` in Å."""
    modes = "".join(
        f'<scan_parameters mode="{mode}"><scan_size>{part}</scan_size>'
        f"<scan_resolution_y>{shape[0]}</scan_resolution_y>"
        f"<scan_resolution_x>{shape[1]}</scan_resolution_x></scan_parameters>"
        for mode, part, shape in (("search", 0.8, search), ("acquire", size, scan))
    )
    view = step * 1e-10 * max(scan) * 0.72
    return (
        f'<root name="scan"><software_version>1.2.2  (2021-08-20)</software_version>'
        f'<raw_file filename="{raw}"/><exposure_time>2</exposure_time>{modes}'
        f"<iom_measurements><full_scan_field_of_view><scale_factor>0.72</scale_factor>"
        f"<x>{view!r}</x><y>{view!r}</y></full_scan_field_of_view>"
        f"<high_voltage>300000.0</high_voltage>{more}</iom_measurements></root>"
    )
