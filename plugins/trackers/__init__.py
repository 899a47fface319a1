"""Built-in experiment trackers. Each runs in a process of its own, so it may set environment variables."""
