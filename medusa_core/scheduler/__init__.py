"""Decides what runs in each step: admission, chunked prefill, tree size, preemption. Plain data in and out; no torch."""
