"""Explainers: one file each, registered by name; importing this package registers all built-in ones."""
