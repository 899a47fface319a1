"""From a recipe and opened sources to a checked plan."""
