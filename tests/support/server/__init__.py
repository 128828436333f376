"""Servers to test against: fakes and real ones, and their clients."""
