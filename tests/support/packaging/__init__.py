"""An environment with the runtime dependencies alone, and a program that tries every command in it."""
