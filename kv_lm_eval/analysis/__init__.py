"""What a model's attention heads look at: statistics, a classification, and the profile that head_aware reads."""
