"""Tokenisation and clustering of text."""
