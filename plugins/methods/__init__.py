"""The methods: each module or folder is one system from the literature, or a family of merges."""
