"""Merges of task vectors: expert minus seed."""
