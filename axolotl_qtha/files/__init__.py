"""Files that must survive a crash."""
