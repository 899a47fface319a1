"""Writes the folder of a generalist: files, manifest and model card."""
