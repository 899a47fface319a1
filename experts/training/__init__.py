"""Training one run, from its specification to a finished artefact."""
