"""The running process: progress display, devices, memory allocator, environment variables, worker processes."""
