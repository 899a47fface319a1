"""Decoders: how the next token of a text comes about."""
