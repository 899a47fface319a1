"""Exporters: a model as a plain Hugging Face folder, or as a GGUF file."""
