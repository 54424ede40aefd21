"""`python -m lolrl` is the command `lolrl`."""

import sys

from lolrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
