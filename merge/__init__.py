"""From experts to a generalist: the merge engine, dense methods, ensembles."""
