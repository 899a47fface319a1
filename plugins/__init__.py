"""The built-in plugins, each wired up exactly as a third party's plugin would be."""
