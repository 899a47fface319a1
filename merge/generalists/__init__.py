"""The folder of a finished generalist: files, manifest and model card."""
