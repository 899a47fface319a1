"""The models that a merge reads: tensors, adapters, tokenizers, licences, provenance."""
