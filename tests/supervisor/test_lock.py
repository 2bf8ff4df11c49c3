import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import StageFailed, StorageError
from rlhf.supervisor.lock import holder, is_held, run_lock


def test_a_second_supervisor_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one" / "run.lock"
    code = (
        f"from pathlib import Path; from rlhf.supervisor.lock import run_lock\nwith run_lock(Path({str(path)!r})): pass"
    )
    with run_lock(path):
        assert is_held(path)
        with pytest.raises(
            StageFailed, match=rf"{path.parent} is in use by another `rlhf run` \(process {holder(path)}\)"
        ):
            run_lock(path).__enter__()
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert "StageFailed" in other.stderr
    assert not is_held(path)
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    code = (
        "import os, signal; from pathlib import Path; from rlhf.supervisor.lock import run_lock\n"
        f"with run_lock(Path({str(path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == -9
    assert path.exists()
    assert not is_held(path)
    with run_lock(path):
        pass


def test_no_folder_no_lock(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "run.lock")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"run\.lock cannot be written: .*; choose another run\.folder"):
        run_lock(tmp_path / "file" / "run.lock").__enter__()
