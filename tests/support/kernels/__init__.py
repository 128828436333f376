"""Oracles, cases and tolerances for the kernels."""
