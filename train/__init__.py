"""Everything that makes and measures MANet's weights: python -m train.<verb>."""
