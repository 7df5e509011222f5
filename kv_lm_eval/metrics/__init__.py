"""Plain functions over records, with units in their names."""
