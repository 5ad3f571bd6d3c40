"""Both packages held against a float64 reference and against each other."""
