"""Text on the caller's side of the process: tokenizer, chat template, incremental detokenizer, stop strings, tool calls."""

from medusa_core.text.processor import OutputText, TextDelta, TextProcessor
from medusa_core.text.tokenizer import import_tokenizers

__all__ = ["OutputText", "TextDelta", "TextProcessor", "import_tokenizers"]
