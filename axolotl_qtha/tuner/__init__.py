"""The QTHA method as PEFT has methods (`peft/tuners/...`), without Axolotl."""
