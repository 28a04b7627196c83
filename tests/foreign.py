"""Files written by the formats' own libraries, which live in environments apart from ours.

`python_with("emdfile")` is the Python of such an environment, made once and kept in the temporary
folder; `run` runs a script in it. Tests that use them are slow, and skipped without a network.
"""

import fcntl
import functools
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import venv

import pytest


PEERS = "SMPR3D_PEERS_PYTHON"
"""Environment variable: a Python that has the packages already, used instead of making one."""
MINUTES = 15
# After a failure the other workers need not wait for pip as well.
FORGIVEN_AFTER = 600


@functools.cache
def python_with(*packages: str) -> pathlib.Path:
    """A Python that has these packages ("emdfile" or "emdfile==0.0.16"); skips where pip fails."""
    given = os.environ.get(PEERS)
    if given:
        _check_given(pathlib.Path(given), packages)
        return pathlib.Path(given)
    wanted = f"{sys.version_info[:2]} {' '.join(sorted(packages))}"
    key = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    folder = pathlib.Path(tempfile.gettempdir()) / f"smpr3d_jax_peers_{os.getuid()}" / key
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            _make(folder, packages)
    return folder / "bin" / "python"


def _check_given(python: pathlib.Path, packages: tuple[str, ...]) -> None:
    ask = "import importlib.metadata as m, sys; [m.version(n) for n in sys.argv[1:]]"
    names = [re.split(r"[^\w.-]", package)[0] for package in packages]
    answer = subprocess.run([python, "-I", "-c", ask, *names], capture_output=True, text=True)
    if answer.returncode:
        reason = answer.stderr.strip().splitlines()[-1]
        pytest.skip(f"{PEERS}={python} lacks one of {', '.join(packages)}: {reason}")


def _make(folder: pathlib.Path, packages: tuple[str, ...]) -> None:
    """Install into a new environment, and remember whether it worked."""
    failed = folder / "failed"
    if failed.exists() and time.time() - failed.stat().st_mtime < FORGIVEN_AFTER:
        pytest.skip(failed.read_text())
    venv.create(folder, with_pip=True, clear=False)
    command = [folder / "bin" / "python", "-I", "-m", "pip", "install", "-q", *packages]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
        said = answer.stderr.strip().splitlines() or ["no reason given"]
        reason = said[-1] if answer.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"not done after {MINUTES} minutes"
    if reason is not None:
        failed.write_text(f"pip could not install {', '.join(packages)}: {reason}")
        pytest.skip(failed.read_text())
    failed.unlink(missing_ok=True)
    (folder / "ready").touch()


def run(python: pathlib.Path, script: str, *arguments: object, timeout: float = 300) -> str:
    """What a script prints, run with `arguments` by a Python of `python_with`; fails if it does."""
    command = [python, "-I", "-W", "ignore", "-c", textwrap.dedent(script), *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if answer.returncode:
        pytest.fail(f"the foreign library failed:\n{answer.stderr}")
    return answer.stdout
