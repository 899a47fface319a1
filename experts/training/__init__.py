"""Training of one run, from its specification to the finished artefact."""
