"""Merge methods on task vectors (expert minus seed)."""
