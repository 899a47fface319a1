"""Text of domains: reading, packing, discovering and selecting documents."""
