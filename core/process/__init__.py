"""The running process: progress, devices, memory, environment."""
