"""Decoders: models that change another one's next-token distribution, and the choice among samples."""
