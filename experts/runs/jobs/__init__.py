"""Jobs of runs in the queue of a scheduler: submission, progress, restarts, outcome."""
