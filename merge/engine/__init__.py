"""The streaming engine: reads tensors, computes, and writes shards."""
