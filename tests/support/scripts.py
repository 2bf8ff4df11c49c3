"""A script as `python SCRIPT` runs it, without another process that imports torch."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


def run_script(script: Path, *arguments: str) -> None:
    """As the main module, found by processes that it spawns; its folder is where imports are looked for first."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [str(script), *arguments])
        patched.setattr(sys, "path", [str(script.parent), *sys.path])
        runpy.run_path(str(script), run_name="__main__")
