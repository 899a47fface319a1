"""Clustering of texts by their words."""
