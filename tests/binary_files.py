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


def mib_header(number, chips, shape, kind, layout, depth, exposure_ns=1_500_000, counter=0):
    """The text before a frame, as Merlin software writes it; `shape` is that of stored pixels."""
    length = 768 if chips == 4 else 384
    chip = (
        "3RX,175,511,000,000,000,000,000,000,125,255,125,125,100,100,082,100,087,030,128,004,255,"
    )
    text = (
        f"MQ1,{number:06d},{length:05d},{chips:02d},{shape[1]:04d},{shape[0]:04d},{kind},"
        f"{layout:>6},{2**chips - 1:02X},2020-05-18 16:51:49.971626,{exposure_ns * 1e-9:.6f},"
        + f"{counter},0,0,1.200000E+2,5.110000E+2,"
        + chip * chips
        + f"MQ1A,2020-05-18T14:51:49.971626178Z,{exposure_ns}ns,{depth},"
    )
    return text.encode().ljust(length, b"\0")


def packed(rows, depth):
    """What the chips send: counters in 64-bit words, the last pixel of a word first."""
    if depth == 24:
        return packed(rows >> 12, 12) + packed(rows & 0xFFF, 12)
    if depth == 1:
        bits = (rows.reshape(-1, 64) & 1).astype(np.uint64)
        words = (bits << np.arange(64, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
        return words.astype(">u8").tobytes()
    dtype = ">u1" if depth == 6 else ">u2"
    per_word = 8 // np.dtype(dtype).itemsize
    return rows.reshape(-1, per_word)[:, ::-1].astype(dtype).tobytes()


def as_chips(frame):
    """A square frame as four chips send it: 4, 3, 2, 1 side by side, 3 and 4 by 180 degrees."""
    half = frame.shape[0] // 2
    top, bottom = frame[:half], np.rot90(frame[half:], 2)
    return np.hstack([bottom, top[:, half:], top[:, :half]])


def save_mib(path, cube, kind="U16", layout="1x1", depth=12, chips=1, number=1, hdr=None):
    """Frames after headers; raw ones (kind R64) in the chips' own order."""
    frames = cube.reshape(-1, *cube.shape[-2:])
    with open(path, "wb") as file:
        for i, frame in enumerate(frames):
            stored = as_chips(frame) if kind == "R64" and chips == 4 else frame
            shape = stored.shape
            if kind == "R64":
                shape = (shape[0], shape[1] * (2 if depth == 24 else 1))
                pixels = packed(stored, depth)
            else:
                pixels = stored.astype({"U08": ">u1", "U16": ">u2", "U32": ">u4"}[kind]).tobytes()
            file.write(mib_header(number + i, chips, shape, kind, layout, depth) + pixels)
    if hdr is not None:
        path.with_suffix(".hdr").write_bytes(hdr)
    return path


def mib_hdr(frames, per_trigger, *more):
    """The text file beside the frames."""
    lines = [
        "HDR,\t",
        "Time and Date Stamp (day, mnth, yr, hr, min, s):\t18/05/2020 16:51:48",
        "Counter Depth (number):\t12",
        f"Frames in Acquisition (Number):\t{frames}",
        f"Frames per Trigger (Number):\t{per_trigger}",
        *more,
        "End\t",
    ]
    return "\r\n".join(lines).encode()


DM_CODES = {"i2": 2, "i4": 3, "u2": 4, "u4": 5, "f4": 6, "f8": 7, "u1": 8, "i1": 9}
DM_TYPES = {"i2": 1, "f4": 2, "u1": 6, "i4": 7, "i1": 9, "u2": 10, "u4": 11, "f8": 12}


class DmWriter:
    """Tags of DigitalMicrograph: a dict is a group, a list one without names."""

    def __init__(self, version=4, little=True):
        self.version, self.order = version, "<" if little else ">"

    def number(self, value):
        return int(value).to_bytes(8 if self.version == 4 else 4, "big")

    def file(self, tags):
        body = self.group(tags)
        start = (self.version).to_bytes(4, "big") + self.number(len(body))
        return start + int(self.order == "<").to_bytes(4, "big") + body + b"\0" * 8

    def group(self, tags):
        named = tags.items() if isinstance(tags, dict) else (("", item) for item in tags)
        parts = [self.entry(name, item) for name, item in named]
        return b"\0\0" + self.number(len(parts)) + b"".join(parts)

    def entry(self, name, item):
        is_group = isinstance(item, dict | list)
        body = self.group(item) if is_group else self.value(item)
        start = (b"\x14" if is_group else b"\x15") + len(name).to_bytes(2, "big") + name.encode()
        return start + (self.number(len(body)) if self.version == 4 else b"") + body

    def value(self, item):
        if isinstance(item, tuple):  # a record of 16-bit numbers
            words = [15, 0, len(item), *(n for _ in item for n in (0, 2))]
            data = np.array(item, self.order + "i2").tobytes()
        elif isinstance(item, str):
            words, data = (
                [20, 4, len(item)],
                item.encode(f"utf-16-{self.order == '<' and 'le' or 'be'}"),
            )
        elif isinstance(item, np.ndarray):
            words = [20, DM_CODES[item.dtype.str[1:]], item.size]
            data = item.astype(item.dtype.newbyteorder(self.order)).tobytes()
        else:
            code = {bool: 8, int: 5, float: 7}[type(item)]
            kind = {8: "u1", 5: "u4", 7: "f8"}[code]
            words, data = [code], np.array(item, self.order + kind).tobytes()
        return b"%%%%" + self.number(len(words)) + b"".join(map(self.number, words)) + data


def dm_image(stored, steps, units, tags=None, name=None):
    """An image of DigitalMicrograph: `stored` as it is on disk, steps and units fastest first."""
    dimension = [
        {"Origin": 0.0, "Scale": float(step), "Units": unit}
        for step, unit in zip(steps, units, strict=True)
    ]
    image = {
        "ImageData": {
            "Calibrations": {
                "Brightness": {"Origin": 0.0, "Scale": 1.0, "Units": ""},
                "Dimension": dimension,
            },
            "Data": stored.ravel(),
            "DataType": DM_TYPES[stored.dtype.str[1:]],
            "Dimensions": [int(n) for n in stored.shape[::-1]],
            "PixelDepth": stored.itemsize,
        },
        "ImageTags": tags or {},
    }
    return image | ({"Name": name} if name else {})


def dm_thumbnail():
    """The small picture that comes first in most files."""
    image = dm_image(np.zeros((6, 4), "i4"), (1, 1), ("", ""))
    image["ImageData"]["DataType"] = 23
    return image


def save_dm(path, images, version=4, little=True):
    tags = {
        "ApplicationBounds": (0, 0, 1015, 1680),
        "DocumentObjectList": [{"AnnotationType": 20, "ImageSource": 1}],
        "ImageList": images,
        "InImageMode": True,
    }
    path.write_bytes(DmWriter(version, little).file(tags))
    return path


def dm_scan(cube, swapped, tags=None, steps=(5.0, 4.0, 0.2, 0.1), **more):
    """A cube (sy, sx, ky, kx) in either order; steps in pm, Å, 1/nm, 1/nm."""
    stored = cube if swapped else np.transpose(cube, (2, 3, 0, 1))
    units = ("pm", "Å", "1/nm", "1/nm")
    fastest = (3, 2, 1, 0) if swapped else (1, 0, 3, 2)
    return dm_image(
        np.ascontiguousarray(stored),
        [steps[i] for i in fastest],
        [units[i] for i in fastest],
        tags,
        **more,
    )
