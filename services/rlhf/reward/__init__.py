"""The reward service: scores from a reward model or from a rule."""
