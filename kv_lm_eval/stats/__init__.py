"""How sure a number is: what counts as one observation, intervals, paired comparison, tests by betting.

One observation is what was drawn by itself. Questions about one text, the depths of one filler and the tokens of one
passage share what is hard about it, so they are one cluster and never counted as several.
"""
