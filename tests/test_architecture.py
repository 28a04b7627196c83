"""The house rules: who may import whom, how long a file may be, what a user sees."""

import ast
import pathlib
import subprocess
import sys

import pytest

import smpr3d_jax


PACKAGE = pathlib.Path(smpr3d_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {
    "physics": {"physics"},
    "report": {"report"},
    "data": {"data", "physics"},
    "inverse": {"inverse", "data", "physics"},
    "app": {"app", "inverse", "data", "physics", "report"},
}
INSIDE = {
    "physics": "grid fourier zernike coherence optics limits scan potentials specimen propagation "
    "smatrix windows beamlets passage layers crossing ptychography detector sparse forward "
    "simulation",
    "inverse": "losses priors penalties updates batches reconstruction constraints pie epochs "
    "exchange resolution refinement sections structure fisher uncertainty transfer sampling "
    "design planning rasters virtual dpc brightfield unfolding parallax ssb wigner seeds",
    "report": "store volumes figures refined planned page pictures calibration",
}
"""In a wing a file imports only files named before it."""


def relative(path: pathlib.Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def name(path: pathlib.Path) -> str:
    return "/".join(relative(path))


def imported(path: pathlib.Path) -> list[tuple[str, ...]]:
    """Where in the package each import of a file leads, from the package's root."""
    places: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name.split(".") for alias in node.names]
            places += [tuple(parts[1:]) for parts in named if parts[0] == PACKAGE.name]
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = relative(path)[: len(relative(path)) - node.level] + module
            elif module[:1] == (PACKAGE.name,):
                base = module[1:]
            else:
                continue
            # `from . import x` names modules, `from .x import y` names what is in one.
            folder = PACKAGE.joinpath(*base).is_dir()
            places += [(*base, alias.name) if folder else base for alias in node.names]
    return places


@pytest.mark.parametrize("path", [p for p in FILES if len(relative(p)) > 1], ids=name)
def test_imports_go_down(path):
    wing = relative(path)[0]
    assert wing in ALLOWED, f"{wing} is no wing of the house"
    for place in imported(path):
        assert place and place[0] in ALLOWED[wing], f"{name(path)} may not import {place}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if relative(p)[0] in INSIDE and p.stem != "__init__"], ids=name
)
def test_inside_a_wing_files_import_those_before_them(path):
    wing, own = relative(path)
    order = INSIDE[wing].split()
    for place in imported(path):
        if place[0] == wing:
            assert order.index(place[1]) < order.index(own), f"{name(path)} imports {place}"


def test_no_imports_go_round_in_circles():
    known = {relative(p): set() for p in FILES}
    for path in FILES:
        for place in imported(path):
            # A module, a folder's face, or a name in the face of the folder.
            here = (place, (*place, "__init__"), (*place[:-1], "__init__"))
            known[relative(path)] |= {next(module for module in here if module in known)}
    while known:
        free = {module for module, needs in known.items() if not needs & set(known)}
        assert free, f"circle among {sorted('/'.join(m) for m in known)}"
        known = {module: needs for module, needs in known.items() if module not in free}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)


@pytest.mark.parametrize(
    "path", [p for p in FILES if relative(p)[0] in ("physics", "data", "inverse")], ids=name
)
def test_computing_files_do_not_print(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


def test_every_public_name_appears_once():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    aliases = [a for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert all(alias.name == alias.asname for alias in aliases), "the face must not rename"
    names = [alias.name for alias in aliases]
    assert len(names) == len(set(names))
    for public in names:
        thing = getattr(smpr3d_jax, public)
        assert not public.startswith("_")
        assert getattr(thing, "__doc__", None), f"{public} has no docstring"
        assert public in dir(smpr3d_jax)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(smpr3d_jax, "no" + "thing")


def test_to_read_a_file_the_rest_is_not_imported():
    code = "import sys, smpr3d_jax as sj; sj.read, sj.readers; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(answer.stdout.split())
    assert "smpr3d_jax.data.readers" in loaded, answer.stderr
    unneeded = {"ase", "matplotlib", "scipy.optimize", "smpr3d_jax.inverse", "smpr3d_jax.report"}
    assert not unneeded & loaded
