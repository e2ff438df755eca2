"""Training from data alone: the models that the others start from."""
