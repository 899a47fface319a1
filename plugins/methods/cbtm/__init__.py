"""Cluster-Branch-Train-Merge: discovery of domains in unlabelled text."""

from .plugin import domain_discoverers, mixers

__all__ = ["domain_discoverers", "mixers"]
