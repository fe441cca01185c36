"""The base model: loaded, hooked, run with updates switched in and out."""
