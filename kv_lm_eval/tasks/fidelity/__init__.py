"""Fidelity tasks, `kv_fidelity_*`: how far a method's predictions are from the full cache's, over whole texts."""
