"""Settings: TOML file + environment + `--set`, as frozen objects. Each section is defined beside the code it sets."""

from rlhf.settings.section import Section
from rlhf.settings.shared import Compute, InstanceName, Listen, Optimisation

__all__ = ["Compute", "InstanceName", "Listen", "Optimisation", "Section"]
