"""The merging rules, one family a file; importing a family registers its rules."""
