"""Low-rank updates and their algebra; PEFT's adapter folders; heads beside them."""
