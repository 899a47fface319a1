"""Vocabularies of a merge: the tokens and embedding rows of each model, and the vocabulary of the output."""
