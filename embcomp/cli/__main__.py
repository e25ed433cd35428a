"""`python -m embcomp.cli`: the command, where its script is not on the path."""

from embcomp.cli import main

main()
