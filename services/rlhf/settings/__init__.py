"""Settings: TOML file + environment + `--set`, as frozen objects. Each section is defined beside the code it sets."""

from rlhf.settings.section import Section
from rlhf.settings.shared import Compute, Listen, Optimisation

__all__ = ["Compute", "Listen", "Optimisation", "Section"]
