"""The type of the functions that get the progress of slow work. Imports nothing that is slow."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # tensor name, bytes of the source done, bytes in all
