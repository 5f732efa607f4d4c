"""Metrics: one file a family, registered by name; importing this package registers all built-in ones (no torch)."""
