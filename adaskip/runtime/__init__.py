"""The skip runtime: attach routers to a Hugging Face model and really leave the skipped work out."""
