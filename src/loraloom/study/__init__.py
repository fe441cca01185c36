"""A recipe run to its end: stages, store, results."""
