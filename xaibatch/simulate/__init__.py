"""Simulated chest radiographs with known truth: a CT, a pose and a lesion come in; film, twin and masks go out.

Synthetic, not for clinical use.
"""
