"""`axolotl qtha-hardware-eval`: a trained adapter on a device, beside simulations of it."""
