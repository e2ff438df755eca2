"""The solvers, one file a family."""
