"""The owner's processes: SuperNode, guarded client app and work on requests."""
