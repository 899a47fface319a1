"""Commands that use artefacts."""
