"""What adapters and statistics foretell, and what they do to each other."""
