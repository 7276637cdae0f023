"""Generation beyond one batch: many prompts by their paths, and one path as a plain model."""
