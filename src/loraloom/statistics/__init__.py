"""What the layers of a base model see of texts: collected, bounded, shared."""
