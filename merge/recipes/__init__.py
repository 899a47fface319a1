"""What a merge should do: recipes, their parameters, and mergekit configuration files."""
