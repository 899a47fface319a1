"""Retrieval: passages of domains, searched by their words or by embeddings, for decoders that read documents."""
