"""LongBench v2: 503 questions with four choices over long texts, as the official pred.py and result.py run them."""
