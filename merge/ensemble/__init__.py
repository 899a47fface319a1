"""Ensembles: models evaluated side by side and mixed by the domain posterior or a cluster router."""
