"""Measurements of this package against the bare forward pass and against stock tools; one file a part."""
