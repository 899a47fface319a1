"""Planning of merges: from a recipe and its sources to a checked plan."""
