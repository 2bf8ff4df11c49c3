"""The rollout worker: prompt in, scored rollout out."""
