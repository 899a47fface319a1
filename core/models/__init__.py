"""Model loading, scoring and text generation."""
