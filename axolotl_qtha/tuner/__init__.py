"""The QTHA method as PEFT has methods (`peft/tuners/...`), with PyTorch and PEFT alone."""
