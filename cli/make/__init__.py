"""Commands that make artefacts."""
