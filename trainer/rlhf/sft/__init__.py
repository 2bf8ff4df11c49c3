"""Step 1: pretraining and supervised fine-tuning."""
