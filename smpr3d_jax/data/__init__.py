"""The measured world: from files to calibrated counts."""
