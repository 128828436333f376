"""Training over the API with a fake trainer."""
