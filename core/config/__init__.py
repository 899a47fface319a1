"""The project file expertctl.yaml: what it may hold, and reading it."""
