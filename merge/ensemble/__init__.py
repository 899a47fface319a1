"""Ensembles: members side by side, weighed by the domain posterior or by clusters."""
