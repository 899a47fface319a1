"""Corpus formats, launchers, evaluators, architectures and trainable parts."""
