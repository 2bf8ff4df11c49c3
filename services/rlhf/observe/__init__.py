"""Logs and status."""
