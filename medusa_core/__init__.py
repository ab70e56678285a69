"""An inference engine for causal language models with Medusa heads. Tokens in, tokens out; no HTTP."""

__version__ = "0.1.0"
