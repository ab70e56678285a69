"""The device side: executes plans. KV store, lane state, packing, runner."""
