"""What becomes of the pairs that were not kept: one treatment, one file, named by `evicted=`. It fits any scorer."""
