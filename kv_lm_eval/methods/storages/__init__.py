"""In what form pairs are held: one form, one file, named by `kv_cache_dtype=`. It fits any scorer."""
