"""Grammars for a loaded model: its tokenizer, as the engine's side needs it."""

from __future__ import annotations

import logging
import time

from llguidance import LLTokenizer
from transformers import AutoTokenizer

from medusa_core.grammar.compiler import GrammarCompiler, vocabulary
from medusa_core.model.loader import LoadedModel

logger = logging.getLogger(__name__)


def grammar_compiler(loaded: LoadedModel, *, trust_remote_code: bool = False) -> GrammarCompiler:
    """A compiler that reads the model's tokenizer when the first grammar comes. That takes a second or two, and the engine's steps
    wait for it once."""

    def load() -> LLTokenizer:
        start_s = time.perf_counter()
        try:
            tokenizer = AutoTokenizer.from_pretrained(loaded.folder, trust_remote_code=trust_remote_code, local_files_only=True)
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"it cannot be read ({error})") from error
        tokens = vocabulary(tokenizer, loaded.project.num_tokens, loaded.eos_token_ids)
        logger.info("Read the vocabulary for grammars in %.1f s.", time.perf_counter() - start_s)
        return tokens

    return GrammarCompiler(load)
