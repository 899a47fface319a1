"""Network transport of federations, built on Flower; all code that depends on Flower's version is in this folder."""
