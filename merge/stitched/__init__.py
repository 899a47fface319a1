"""Stitched models: frozen models side by side, joined by small trained layers."""
