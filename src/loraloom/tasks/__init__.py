"""A task is rows, a head's width and a metric: built in, from GLUE, or from files and the hub."""
