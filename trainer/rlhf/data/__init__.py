"""Prompts, texts, pairs and comparisons from files; the synthetic world of the demo."""
