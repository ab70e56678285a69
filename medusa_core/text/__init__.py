"""Text on the caller's side of the process boundary: tokenizer, chat template, incremental detokenizer, stop strings."""

from medusa_core.text.processor import OutputText, TextDelta, TextProcessor

__all__ = ["OutputText", "TextDelta", "TextProcessor"]
