"""Merging of experts into generalists: recipes, planning, the streaming engine, and merge methods."""
