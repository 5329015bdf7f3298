"""The YAML: what may stand in it, and what it says, as values."""
