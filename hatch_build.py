"""Build hook: protobuf and gRPC code with type stubs, generated from protos/ into protos/ and never checked in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


class ProtobufBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        import grpc_tools
        from grpc_tools import protoc

        sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").rglob("*.proto"))
        includes = [f"-I{ROOT / 'protos'}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
        outputs = [f"--{kind}_out={ROOT / 'protos'}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        status = protoc.main(["protoc", *includes, *outputs, *(str(ROOT / source) for source in sources)])
        if status != 0:
            raise RuntimeError(f"protoc failed with status {status} on {', '.join(sources)}")
