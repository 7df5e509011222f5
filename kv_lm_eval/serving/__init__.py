"""A user's own transformers model over a compressed cache, from Python: `compress`, `compressed_cache`, `prefill`."""
