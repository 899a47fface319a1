"""Planning a federation: the coordinator's own code against owners that are a model on a clock."""
