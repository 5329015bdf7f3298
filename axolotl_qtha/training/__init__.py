"""Around a training run: guards, checkpoints, diagnostics and the model card."""
