"""Expert computation of mixtures on a CPU."""
