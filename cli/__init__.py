"""The command line: one module per command; all work is done by the layers below."""
