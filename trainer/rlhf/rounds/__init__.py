"""Rounds of feedback while PPO runs: new completions, judgments, a refreshed reward model, an audit of the policy."""
