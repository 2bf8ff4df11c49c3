"""The layout that keeps one namespace over four source roots, and no folder an importable package of its own."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("protos", "kernels", "services", "trainer")


@pytest.mark.parametrize("name", SOURCE_ROOTS)
def test_a_source_root_is_no_package(name: str) -> None:
    """`transformers` probes for a package called `kernels`; a folder of ours under that name would break it."""
    assert (ROOT / name / "rlhf").is_dir()
    assert not (ROOT / name / "__init__.py").exists()
    spec = importlib.util.find_spec(name)
    if spec is not None:
        places = [spec.origin, *(spec.submodule_search_locations or ())]
        assert not any(place and Path(place).is_relative_to(ROOT) for place in places if ".venv" not in (place or ""))


def test_a_source_root_is_no_package_outside_the_suite_either(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        f"found = [name for name in {SOURCE_ROOTS!r} if importlib.util.find_spec(name) is not None]\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_namespace_has_no_init() -> None:
    inits = [str(path.relative_to(ROOT)) for name in SOURCE_ROOTS for path in (ROOT / name).glob("rlhf/__init__.py")]
    assert inits == []


def test_every_root_gives_to_the_one_namespace() -> None:
    import rlhf

    assert {Path(place).parent.name for place in rlhf.__path__} >= set(SOURCE_ROOTS)
    assert getattr(rlhf, "__file__", None) is None


def test_no_module_is_in_two_roots() -> None:
    modules = [path.relative_to(ROOT / name) for name in SOURCE_ROOTS for path in (ROOT / name).rglob("*.py")]
    assert len(set(modules)) == len(modules) > 50


def test_the_tests_are_no_packages_and_their_names_are_unique() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_package_says_what_it_is_for() -> None:
    for name in SOURCE_ROOTS[1:]:
        for folder in sorted((ROOT / name / "rlhf").iterdir()):
            if folder.is_dir() and list(folder.glob("*.py")):
                init = folder / "__init__.py"
                assert init.exists(), folder
                assert init.read_text().startswith('"""'), init
                assert (folder / "py.typed").exists(), folder
