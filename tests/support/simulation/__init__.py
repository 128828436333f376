"""The scheduler under a seeded simulator."""
