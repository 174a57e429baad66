"""Long trials of hostile input, bounded and repeatable: python -m tests.campaign {files,requests} [--count N].

A small slice of each runs with the tests.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Run a campaign and print its table; 1 if anything ended otherwise than it must, else 0."""
    sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it
    import campaign_files
    import campaign_requests

    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    campaign_files.add_arguments(verbs.add_parser("files", help=campaign_files.__doc__.splitlines()[0]))
    campaign_requests.add_arguments(verbs.add_parser("requests", help=campaign_requests.__doc__.splitlines()[0]))
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
