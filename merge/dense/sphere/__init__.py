"""Spherical interpolation and spherical means of models."""
