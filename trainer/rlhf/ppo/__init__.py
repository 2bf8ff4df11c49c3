"""Step 3: the PPO trainer."""
