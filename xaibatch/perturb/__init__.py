"""Perturbation plans (which changed copies of an image to run) and how a device expands and runs them."""
