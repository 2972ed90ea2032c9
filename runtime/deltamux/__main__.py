"""`python -m deltamux`: the same as the `deltamux` command."""

import sys

from deltamux.cli import main

if __name__ == "__main__":
    sys.exit(main())
