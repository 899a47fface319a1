"""Inputs of a merge: models, adapters, tokenizers, statistics, licences and lineage."""
