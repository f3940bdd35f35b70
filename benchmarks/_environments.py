"""Virtual environments for the libraries that benchmarks compare with."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Sequence


def environment(name: str, requirements: Sequence[str], folder: pathlib.Path) -> str:
    """The interpreter of a virtual environment in ``folder``, made where it is missing."""
    path = (folder / f"env-{name}").absolute()
    python = path / "bin" / "python"
    create = [] if python.exists() else [[sys.executable, "-m", "venv", str(path)]]
    install = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    for command in (*create, install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).splitlines() or ["pip failed"]
            raise RuntimeError(next((line for line in lines if "ERROR" in line), lines[0]))
    return str(python)
