"""Experiment trackers: checks before a run, and the processes that record it."""
