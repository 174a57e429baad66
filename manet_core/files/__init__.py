"""Reading files: every format, and why a file is refused."""
