"""Stitched models: frozen models connected by small trainable stitch layers."""
