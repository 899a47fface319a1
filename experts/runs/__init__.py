"""Setting up and launching training runs."""
