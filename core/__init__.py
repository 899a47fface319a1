"""Method-independent foundation: errors, artefact files, manifests, configuration, models, plugin hooks."""
