"""Merges of merges: repeating one from its manifest, with other experts, and several that build on each other."""
