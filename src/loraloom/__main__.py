"""`python -m loraloom` is the command line."""

from loraloom.cli import main

main()
