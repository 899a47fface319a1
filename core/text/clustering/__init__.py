"""Texts sorted into clusters by the words that they use."""
