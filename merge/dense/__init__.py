"""Merging tensor by tensor: one method a file, each a pure function for numpy arrays and torch tensors alike."""
