"""Drafting a tree of tokens and verifying it exactly."""
