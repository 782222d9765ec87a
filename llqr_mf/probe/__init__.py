"""Probing curvature and what approximates it."""
