"""The quantum branch: one description of the circuit (`ansatz`) and the engines that run it."""
