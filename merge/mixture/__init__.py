"""Mixtures of experts (MoE): combine the feed-forward networks of several models behind a router."""
