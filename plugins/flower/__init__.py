"""Owners who join through Flower. Everything that is bound to a version of Flower stands in this folder; nothing is imported here."""
