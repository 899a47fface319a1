"""Supervised child processes that end with their parent."""
