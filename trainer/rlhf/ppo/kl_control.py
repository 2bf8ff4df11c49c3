"""The coefficient β of the KL penalty: fixed, or steered towards a target."""

from __future__ import annotations

from rlhf.ppo.settings import KlSettings


class KlController:
    """Proportional controller in log space: β ← β (1 + clip(KL / target - 1, ±0.2) · n / horizon).

    KL is in nats per sequence, the sum over a completion's sampled tokens: a per-token mean would make `target` depend
    on the length of the completions.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    def __init__(self, settings: KlSettings) -> None:
        self.settings = settings
        self.coef = settings.coef

    def update(self, kl_nats_per_sequence: float, completions: int) -> None:
        if not self.settings.adaptive:
            return
        error = min(max(kl_nats_per_sequence / self.settings.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * completions / self.settings.horizon
