"""Generation for many requests at once: continuous batching with any model that keeps a cache of keys and values."""
