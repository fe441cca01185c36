"""Training on the Hugging Face Trainer: one adapter of one task, and one merged adapter by its single models."""
