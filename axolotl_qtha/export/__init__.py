"""`axolotl qtha-export`: a trained adapter as a plain LoRA or a merged checkpoint, and what that cost."""
