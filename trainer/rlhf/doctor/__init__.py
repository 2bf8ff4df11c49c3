"""Checks that everything is in place before a run."""
