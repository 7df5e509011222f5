"""RULER as lm-eval tasks: its 13 tasks at any length, and the protocol of NVIDIA/kvpress's public leaderboard."""
