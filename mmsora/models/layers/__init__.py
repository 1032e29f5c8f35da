"""Layers that more than one network uses. Import each from its module."""
