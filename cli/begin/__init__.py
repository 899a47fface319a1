"""Commands that begin a project."""
