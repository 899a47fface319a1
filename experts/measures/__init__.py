"""Measuring models on text: evaluation, statistics, audits and embeddings."""
