"""Experts from owners who hand in weights and never text: everything but the transport."""
