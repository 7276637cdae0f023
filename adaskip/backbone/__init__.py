"""All knowledge of how Hugging Face models are built inside; no other folder looks into them."""
