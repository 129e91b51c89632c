"""`python -m sparsegan` is `sparsegan`."""

from sparsegan.cli import main

main()
