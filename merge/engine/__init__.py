"""The streaming merge engine: reads, merges and writes tensor by tensor."""
