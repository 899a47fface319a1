"""Acceptance checks of delivered experts."""
