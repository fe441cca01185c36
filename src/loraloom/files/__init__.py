"""Files that are whole or absent: writing, hashing, tensors."""
