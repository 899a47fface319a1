"""What everything stands on and no method is known to: errors, files, lineage, configuration, plugins."""
