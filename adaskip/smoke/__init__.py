"""A recipe rehearsed without a network: a small random backbone of its architecture, and conversations to learn."""
