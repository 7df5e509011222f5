"""LooGLE: questions of short and of long dependency, cloze and summaries, asked and scored as officially."""
