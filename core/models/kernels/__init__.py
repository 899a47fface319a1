"""Kernels: the experts of mixtures on a CPU, linear layers in few bits, and the domain posterior."""
