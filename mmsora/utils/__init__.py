"""Helpers that know nothing of models or data. Import what you need from the module itself."""
