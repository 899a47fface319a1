"""Merge recipes: the recipe types, their parameters, and readers of mergekit configuration files."""
