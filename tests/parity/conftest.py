"""Without TRL there is nothing to compare with: `make test-parity` makes the environment that has it."""

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("trl") else ["test_*.py"]
# Its import would warn that what is compared with here may change; the version is exact.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
