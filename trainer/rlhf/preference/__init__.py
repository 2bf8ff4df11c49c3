"""Step 2: rankings by simulated annotators, and the reward model trained on them."""
