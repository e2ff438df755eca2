"""Consistency models: one network that maps every point of a trajectory to its end."""
