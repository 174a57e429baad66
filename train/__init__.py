"""Everything that makes and measures MANet's weights: python -m train.<verb>."""

import sys
from collections.abc import Callable


def run_verb(main: Callable[[], None]) -> None:
    """Run a verb from the command line; Ctrl-C ends it with a sentence and exit status 130, not with a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted; give the same command again, and it goes on with what is finished.", file=sys.stderr)
        sys.exit(130)
