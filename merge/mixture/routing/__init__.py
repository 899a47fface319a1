"""Routers of mixtures: how they start, what they do, and switching experts off."""
