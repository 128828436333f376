"""Small adapters, good and bad, and a hub made of files."""
