"""Cluster-Branch-Train-Merge: domains found in unlabelled text."""

from .plugin import domain_discoverers

__all__ = ["domain_discoverers"]
