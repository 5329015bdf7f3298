"""Reading a trained adapter: its folder, the text it is looked at with, and what passes through it."""
