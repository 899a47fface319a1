"""The exporter `gguf`: one file for llama.cpp and the tools built on it."""

from .plugin import exporters

__all__ = ["exporters"]
