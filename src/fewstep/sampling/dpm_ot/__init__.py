"""DPM-Solver-OT: the expressway and its optimal transport."""
