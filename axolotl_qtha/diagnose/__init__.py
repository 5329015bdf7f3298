"""`axolotl qtha-diagnose`: what papers print of a circuit, at initialisation and trained."""
