"""From text to tokens, and from text to clusters."""
