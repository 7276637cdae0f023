"""The one place that looks into Hugging Face models."""
