"""Triton kernels, the only modules that import triton. Each has a torch reference in its tests or in the package it speeds up.

Import these modules only where a CUDA device (or Triton's interpreter) runs them: a CPU build of torch comes without triton.
"""
