"""`adaskip bench`: what skipping saves, against the dense model and against the same layers physically cut out."""
