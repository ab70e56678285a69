"""Text on the caller's side of the process boundary: tokenizer, chat template, incremental detokenizer, stop strings."""

from medusa_core.text.processor import OutputText, TextDelta, TextProcessor
from medusa_core.text.tokenizer import import_tokenizers

__all__ = ["OutputText", "TextDelta", "TextProcessor", "import_tokenizers"]
