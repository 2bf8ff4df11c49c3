"""The policy service: continuous-batching generation with weights that change between decode steps."""
