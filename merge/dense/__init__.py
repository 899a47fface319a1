"""Dense merge methods: pure functions that merge a `TensorGroup` of numpy arrays or torch tensors."""
