"""Hooks. A new one is a file here: it is found by looking."""
