"""Artefact files: atomic writes, digests, safetensors, workspace layout."""
