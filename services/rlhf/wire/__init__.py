"""Typed records of what travels, and their protobuf form."""
