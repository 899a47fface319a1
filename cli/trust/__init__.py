"""Commands that check and explain artefacts."""
