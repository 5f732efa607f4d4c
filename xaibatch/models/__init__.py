"""Classifiers and how they are read: loading, the recorded forward and backward, re-initialised weights, training."""
