"""The forward world: it knows nothing of experiments."""
