"""Learned samplers."""
