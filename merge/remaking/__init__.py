"""Making a generalist again: from its manifest, or with other experts."""
