"""Discrete data: bits, continuous-time Markov chains, their exact worlds and samplers."""
