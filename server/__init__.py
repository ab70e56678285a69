"""OpenAI-compatible HTTP server over medusa_core."""
