"""Commands added to `axolotl` (entry point group `axolotl.cli_commands`), a file for each subject.

They import what they run when they run it: `axolotl --help` imports all of these files.
"""
