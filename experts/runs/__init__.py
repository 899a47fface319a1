"""Setting up runs: what will be trained, from where, and in which order."""
