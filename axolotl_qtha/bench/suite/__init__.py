"""`axolotl qtha-bench`: a grid of trainings over adapters, learning rates and seeds, and what they show."""
