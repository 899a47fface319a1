"""Weighted means of models."""
