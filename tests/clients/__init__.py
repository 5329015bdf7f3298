"""Exports as the programs read them that they are for; each program runs in an environment of its own."""
