"""Many runs from one file: the plan of a sweep, its points run one by one, and decisions over paired scores."""
