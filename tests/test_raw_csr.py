"""LiberTEM's sparse rows: what is written is read, and what does not fit together is refused."""

import numpy as np
import pytest

from smpr3d_jax.data.counts import Frames, InputError
from smpr3d_jax.data.events import event_rows, EventRows
from smpr3d_jax.data.readers import check_counts, describe, raw_csr, read, write_raw_csr

from . import foreign
from .scan_files import flat, FRAME, SCAN, some_cube
from .test_events import shuffled


FACTS = {"scan_step_A": (0.5, 0.25), "energy_ev": 80e3, "transpose": True, "center": (2.0, 3.0)}


def save(path, cube, kinds=("<i4", "<i4", "<f4"), shape=None):
    """The layout of the format's description, with types of one's own."""
    rows = event_rows(Frames(flat(cube)))
    number = np.ones(len(rows.pixels)) if rows.multiplicity is None else rows.multiplicity
    lines = ['[params]\nfiletype = "RAW_CSR"']
    lines += [f"nav_shape = {[*(shape or cube.shape[:2])]}\nsig_shape = {[*cube.shape[2:]]}"]
    lines += ["[RAW_CSR]"]
    for name, kind, part in zip(
        ("indptr", "indices", "data"), kinds, (rows.indptr, rows.pixels, number), strict=True
    ):
        np.asarray(part).astype(kind).tofile(path.with_name(f"{name}.dat"))
        lines += [f'{name}_file = "{name}.dat"\n{name}_dtype = "{kind}"']
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "kinds", [("<i4", "<i4", "<f4"), (">u8", "<u2", "<u2"), ("i8", ">i4", "u1")]
)
def test_read(tmp_path, kinds):
    cube = some_cube()
    source = read(save(tmp_path / "a.toml", cube, kinds))
    assert (source.format, source.kind) == ("raw_csr", "events")
    assert (source.scan_shape, source.frame_shape) == (SCAN, FRAME)
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    index = np.array([14, 3, 3, 4])
    np.testing.assert_array_equal(source.read(index).dense(), flat(cube)[index])
    assert describe(source)["total_counts"] == cube.sum()
    assert check_counts(source) == ()


@pytest.mark.parametrize("entries", ["counted", "one each"])
def test_write(tmp_path, entries):
    cube = some_cube()
    rows = event_rows(Frames(flat(cube))) if entries == "counted" else shuffled(flat(cube))
    write_raw_csr(tmp_path / "é.toml", rows, SCAN, {**FACTS, "defocus_A": np.nan, "other": 3})
    source = read(tmp_path / "é.toml")
    np.testing.assert_array_equal(source.read().dense(), flat(cube))
    assert source.facts == FACTS
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(InputError, match="2 × 5 scan needs 10 rows of events, got 15"):
        write_raw_csr(tmp_path / "b.toml", rows, (2, 5))


def test_parts_with_ever_larger_counts(tmp_path):
    values = np.zeros((12, *FRAME), np.uint32)
    counts = [1, 2, 1, 255, 3, 256, 1, 0, 5, 70000, 1, 2]
    values.reshape(12, -1)[np.arange(12), np.arange(12)] = counts
    with raw_csr.writing(tmp_path / "a.toml", (4, 3), FRAME) as append:
        for start in range(0, 12, 2):
            append(event_rows(Frames(values[start : start + 2])))
    source = read(tmp_path / "a.toml")
    assert source.dtype == np.uint32
    np.testing.assert_array_equal(source.host().dense(np.uint32), values)


def test_an_unfinished_file_leaves_nothing(tmp_path):
    rows = event_rows(Frames(flat(some_cube())))
    with pytest.raises(RuntimeError), raw_csr.writing(tmp_path / "a.toml", SCAN, FRAME) as append:
        append(rows)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_frames_needs_its_scan_shape(tmp_path):
    path = save(tmp_path / "a.toml", some_cube(), shape=(15,))
    with pytest.raises(InputError, match="give its `scan_shape`"):
        read(path)
    assert read(path, scan_shape=SCAN).scan_shape == SCAN


def change(text, other):
    def edit(path):
        before = path.read_text()
        assert text in before
        path.write_text(before.replace(text, other))

    return edit


def cut(name, n):
    def edit(path):
        file = path.with_name(name)
        file.write_bytes(file.read_bytes()[:-n])

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (change("[3, 5]", "[3, 6]"), "18 frames, so that `indptr` needs 19 numbers, and has 16"),
        (change("[3, 5]", "[3, -5]"), r"nav_shape = \[3, -5\]"),
        (change("[3, 5]", "[300000000, 500000000]"), "damaged"),
        (change("[4, 6]", "[4, 6, 2]"), "sig_shape = .* is no frame"),
        (change("[4, 6]", '"x"'), "sig_shape = 'x'"),
        (change("[4, 6]", "[4, 5]"), r"a\.toml: event index 2\d in frame .* 4 × 5 pixels"),
        (change('"indices.dat"', '"nothing.dat"'), "'nothing.dat' is not there"),
        (change('indices_file = "indices.dat"', ""), "needs indices_file and indices_dtype"),
        (change('indptr_dtype = "<i4"', 'indptr_dtype = "<q9"'), "indptr_dtype = '<q9' is no type"),
        (change('data_dtype = "<f4"', 'data_dtype = "c8"'), "complex64, which are not counts"),
        (change('indices_dtype = "<i4"', 'indices_dtype = "<f4"'), "not numbers of the type"),
        (change("[RAW_CSR]", "[OTHER]"), r"needs a table \[params\]"),
        (change("[RAW_CSR]", "[RAW_CSR"), "is not valid TOML"),
        (cut("indices.dat", 2), "cut short"),
        (cut("indices.dat", 4), "equally many"),
        (cut("data.dat", 4), "equally many"),
        (cut("indptr.dat", 4), "needs 16 numbers, and has 15"),
    ],
)
def test_what_does_not_fit_together(tmp_path, edit, message):
    path = save(tmp_path / "a.toml", some_cube())
    edit(path)
    with pytest.raises(InputError, match=message):
        read(path).host()


@pytest.mark.parametrize("value", [-1, 0.5, np.nan, 1e300])
def test_what_is_no_number_of_electrons(tmp_path, value):
    path = save(tmp_path / "a.toml", some_cube(), ("<i4", "<i4", "<f8"))
    data = np.fromfile(tmp_path / "data.dat")
    data[7] = value
    data.tofile(tmp_path / "data.dat")
    with pytest.raises(InputError, match=r"a\.toml.*is no number of electrons"):
        read(path).read()


def test_falling_rows_are_refused(tmp_path):
    path = save(tmp_path / "a.toml", some_cube())
    limits = np.fromfile(tmp_path / "indptr.dat", "<i4")
    limits[[4, 5]] = limits[[5, 4]]
    limits.tofile(tmp_path / "indptr.dat")
    with pytest.raises(InputError, match="must rise from 0"):
        read(path)


def test_no_electrons(tmp_path):
    nothing = EventRows(np.zeros(16, int), np.zeros(0, np.int32), FRAME)
    write_raw_csr(tmp_path / "a.toml", nothing, SCAN)
    np.testing.assert_array_equal(read(tmp_path / "a.toml").host().total(), np.zeros(15))


@pytest.mark.slow
def test_libertem_reads_what_we_write(tmp_path):
    cube = some_cube()
    write_raw_csr(tmp_path / "a.toml", shuffled(flat(cube)), SCAN, FACTS)
    script = """
        import sys, numpy as np
        from libertem.api import Context
        context = Context.make_with("inline")
        data = context.load("raw_csr", path=sys.argv[1])
        found = np.zeros((*data.shape.nav, *data.shape.sig))
        for y, x in np.ndindex(*data.shape.nav):
            pick = context.create_pick_analysis(data, x=x, y=y)
            found[y, x] = context.run(pick).intensity.raw_data
        np.save(sys.argv[2], found)
    """
    python = foreign.python_with("libertem")
    foreign.run(python, script, tmp_path / "a.toml", tmp_path / "found.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), cube)
