"""Building memories for kNN-LM from the text of domains, and fitting how much they count."""
