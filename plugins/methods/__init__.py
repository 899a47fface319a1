"""Built-in methods: one module or folder per system from the literature or family of merge methods."""
