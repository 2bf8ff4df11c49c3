"""The reference service: log-probs of the frozen initial model."""
