"""Domain text: reading, tokenising, ordering, discovering and selecting documents."""
