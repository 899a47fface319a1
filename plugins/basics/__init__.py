"""Built-in corpus formats, document order, launcher, evaluator, architectures and trainers."""
