"""Who may import whom, as ARCHITECTURE.md states it, read from the source without running it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE_ROOTS = ("kernels", "services", "trainer")

# A settings.py is no part of its package here: it holds names and defaults, and everybody may read them.
LOW = {"errors", "settings"}
SERVICE = {*LOW, "models", "ops", "data", "observe", "queues", "serving", "wire", "v1"}
MAY_IMPORT: dict[str, set[str]] = {
    "ops": set(),
    "wire": {"errors", "v1"},
    "queues": {*LOW, "wire"},
    "serving": {*LOW, "wire", "v1"},
    "feedback": {*LOW, "data", "models", "observe"},
    "rollouts": {*LOW, "observe", "queues", "serving", "wire", "v1"},
    "policy": SERVICE,
    "reward": SERVICE - {"data"},
    "reference": SERVICE - {"data"},
    "annotate": {*LOW, "data", "feedback"},
    "observe": {*LOW, "cli", "models", "queues", "supervisor", "wire"},
    "supervisor": {*LOW, "cli", "models", "observe", "queues", "serving"},
    "cli": {*LOW, "models", "observe"},
    "models": {*LOW, "wire"},
    "ppo": {*LOW, "data", "models", "observe", "ops", "queues", "reward", "serving", "wire", "v1"},
    "sft": {*LOW, "data", "models", "observe", "ops"},
    "preference": {*LOW, "data", "feedback", "models", "observe", "ops", "reward", "sft"},
    "data": {*LOW, "reward", "wire"},
    "rounds": {
        *(
            *LOW,
            "annotate",
            "data",
            "evaluate",
            "feedback",
            "models",
            "observe",
            "ppo",
            "preference",
            "queues",
            "reward",
        ),
        *("rollouts", "serving", "v1", "wire"),
    },
    "evaluate": {*LOW, "data", "models", "observe", "ops", "policy", "reference", "reward", "wire"},
    "doctor": {*LOW, "data", "models", "observe", "ppo", "queues", "reward", "serving", "supervisor", "v1", "wire"},
}


def files(package: str) -> list[Path]:
    found = [path for root in CODE_ROOTS for path in sorted((ROOT / root / "rlhf" / package).rglob("*.py"))]
    assert found, package
    return found


def imported(source: str) -> Iterator[str]:
    """Full names of the modules of ours that the source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            # `from rlhf.ops import kl` and `from rlhf.ops.kl import k1` name the module in different places.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def parts(source: str) -> set[str]:
    """The parts of `rlhf` that the source imports, settings.py files left out."""
    names = [name.split(".") for name in imported(source) if name.startswith("rlhf.")]
    return {name[1] for name in names if "settings" not in name[2:3]}


def test_the_reader_sees_every_form_of_import() -> None:
    source = (
        "import rlhf.queues.streams\nimport torch\n"
        "def later():\n    from rlhf.models import causal\n    from rlhf import wire\n"
        "from rlhf.policy.settings import PolicySettings\nfrom rlhf.policy import settings\n"
    )
    assert parts(source) == {"queues", "models", "wire"}


def test_every_part_has_its_directions() -> None:
    found = {path.parent.name for root in CODE_ROOTS for path in (ROOT / root / "rlhf").glob("*/__init__.py")}
    assert found - LOW == MAY_IMPORT.keys()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_directions(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = {
        f"{path.relative_to(ROOT)} imports rlhf.{part}"
        for path in files(package)
        for part in parts(path.read_text(encoding="utf-8")) - allowed
    }
    assert not wrong


@pytest.mark.parametrize("package", ["ppo", "sft", "preference", "evaluate", "models", "data", "rounds"])
def test_the_trainer_never_imports_a_server(package: str) -> None:
    for path in files(package):
        names = set(imported(path.read_text(encoding="utf-8")))
        servers = {name for name in names if name.startswith("rlhf.") and {"server", "worker"} & set(name.split("."))}
        assert not servers, path


def test_settings_import_only_settings() -> None:
    found = [path for root in CODE_ROOTS for path in (ROOT / root).rglob("settings.py")]
    assert len(found) >= 10
    for path in found:
        names = {name for name in imported(path.read_text(encoding="utf-8")) if name.startswith("rlhf.")}
        assert all(name.startswith("rlhf.settings.") for name in names), path
        assert "torch" not in path.read_text(encoding="utf-8").split(), path


def test_without_torch() -> None:
    """What the command line, the supervisor, the queues and the worker import at their start; nor with the packages of
    the annotation page, which no image below it has."""
    code = (
        "import sys\n"
        "import rlhf.cli.main, rlhf.supervisor.pipeline, rlhf.queues.streams, rlhf.serving.client\n"
        "import rlhf.observe.status, rlhf.wire.messages, rlhf.settings.run, rlhf.rollouts.worker\n"
        "import rlhf.feedback.commands\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'sklearn', 'sqlalchemy', 'fastapi'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_ops_runs_from_a_checkout_with_torch_alone() -> None:
    code = (
        "import sys\n"
        "import rlhf.ops.logprobs, rlhf.ops.kl, rlhf.ops.advantages\n"
        "others = {'transformers', 'grpc', 'redis', 'pydantic', 'google.protobuf'} & set(sys.modules)\n"
        "sys.exit(', '.join(others) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
