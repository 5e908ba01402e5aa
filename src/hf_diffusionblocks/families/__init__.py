"""One file per family of base models."""
