"""Reading files: every format, every refusal."""
