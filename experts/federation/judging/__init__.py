"""Whether a delivered expert is accepted."""
