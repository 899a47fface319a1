"""The steps of a run: the training loop, its loss and learning rate, and guards against diverging."""
