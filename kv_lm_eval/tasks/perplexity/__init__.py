"""Perplexity tasks, `kv_ppl_*`, with the protocol named in every result."""
