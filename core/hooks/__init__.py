"""The plugin interface: hooks, the types that they exchange, and the plugin manager."""
