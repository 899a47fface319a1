"""Flower app bundle sent from the coordinator to owners: two files that import the code installed on each side."""
