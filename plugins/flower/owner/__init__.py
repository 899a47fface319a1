"""The owner's processes: SuperNode, guarded client and training."""
