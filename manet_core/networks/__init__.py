"""The networks, one file a family, and the registry of their names."""
