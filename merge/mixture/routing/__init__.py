"""Routers of mixtures: initialisation, measurement, and disabling experts."""
