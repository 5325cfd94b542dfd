"""`python -m sbd_engine`: the command line."""

from .cli.main import main

main()
