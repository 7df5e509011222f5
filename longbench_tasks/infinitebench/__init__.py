"""InfiniteBench: eight of its tasks of 100,000 tokens, with the prompts and scores of the official scripts."""
