"""Memories: datastores of keys and next tokens of a model on text, for kNN-LM; their manifest, keys and search."""
