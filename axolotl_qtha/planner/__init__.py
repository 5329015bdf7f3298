"""What a run will need, worked out on the meta device before any weight is downloaded or loaded."""
