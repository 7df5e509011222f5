"""HOW keys and values are held: slots with their original positions, one attention function, eviction in place."""
