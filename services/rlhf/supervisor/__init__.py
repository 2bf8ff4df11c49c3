"""Starts, watches and stops the processes of one machine, the embedded Redis among them."""
