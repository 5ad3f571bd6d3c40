"""Runs a case of the registry and returns its trajectory."""
