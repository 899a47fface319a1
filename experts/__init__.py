"""From text to an expert: corpora, the one training loop, trainable parts, evaluation."""
