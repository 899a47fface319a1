"""Mixtures of experts: feed-forwards of several models side by side in one, and what decides between them."""
