"""Bookkeeping of the paged KV cache: which blocks a request holds and which can be shared. No torch, no tensors."""
