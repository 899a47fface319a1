"""CPU kernels for the experts of mixtures."""
