"""Tiny random models (two layers, width 16, with a real tokenizer) and isolated plugin managers for tests."""

from __future__ import annotations

from pathlib import Path

from ..hooks.manager import PluginManager

VOCABULARY = 300
POSITIONS = 128
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def area(width, height):\n    return width * height\n",
    "Whereas the parties agree that the court of the first instance decides.",
    "Größe, façade, 東京: text is more than ASCII.",
)


def tiny_model_folder(
    folder: str | Path, family: str = "olmo2", *, seed: int = 0, tied: bool = False, dtype: str = "float32"
) -> Path:
    """Write a random causal language model as a Hugging Face folder and return the folder.

    `family` is a transformers model type such as `olmo2`, `llama` or `qwen3`. The same `seed` gives the same
    bytes. `tied` shares one matrix between input and output embeddings. The initialisation has a larger standard
    deviation than usual, so that predictions are far from uniform. The tokenizer is a byte-level BPE.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..text.tokenizer import TextEncoder, train_tokenizer

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    train_tokenizer(_SENTENCES, VOCABULARY, target, max_length=POSITIONS)
    encoder = TextEncoder.of_folder(target)
    config = AutoConfig.for_model(
        family,
        vocab_size=encoder.vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=encoder.separator,
        eos_token_id=encoder.separator,
        pad_token_id=encoder.separator,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    return target


def fresh_plugins(*plugins: object, builtins: bool = True) -> PluginManager:
    """Return a manager with the built-ins and `plugins` (modules, classes, objects); errors are kept in `problems`."""
    manager = PluginManager(report=lambda problem: None)
    if builtins:
        manager.load_builtins()
    for plugin in plugins:
        manager.register(plugin, getattr(plugin, "__name__", type(plugin).__name__))
    return manager
