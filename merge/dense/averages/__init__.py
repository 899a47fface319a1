"""Weighted averages of models."""
