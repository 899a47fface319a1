"""From text to an expert: corpora, the training loop, trainable parameters, evaluation."""
