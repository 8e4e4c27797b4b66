"""SGD-SaI for Hugging Face."""
