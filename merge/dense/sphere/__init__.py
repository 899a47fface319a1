"""Means and paths on the sphere."""
