"""Shared models trained in rounds (DiLoCo, federated averaging)."""
