"""What models that make no samples are worth, measured the same way for all."""
