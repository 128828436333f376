"""The type of the functions that get the progress of slow work. Imports nothing that is slow."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what is being done, done, in all); callers name the unit
