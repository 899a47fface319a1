"""Adapters of a model as experts: LoRA, which changes tensors, and prompts, which precede the text."""
