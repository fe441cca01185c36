"""`python -m loraloom` is the command line."""

from loraloom.cli.main import main

main()
