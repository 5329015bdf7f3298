"""What a user can do with an adapter that has just been trained."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path


def whats_next(yaml: str | Path | None, output_dir: str, texts: bool = True) -> Iterator[str]:
    """Yield lines with the commands for a trained adapter, ready to be copied.

    >>> print("\\n".join(whats_next("my.yml", "outputs/mine")))
    The adapter is in outputs/mine. What next:
      axolotl evaluate my.yml --lora-model-dir outputs/mine
      axolotl inference my.yml --lora-model-dir outputs/mine
      axolotl qtha-report outputs/mine
      axolotl qtha-export my.yml --out outputs/mine-lora

    Args:
        yaml: path of the configuration.
        output_dir: of the training.
        texts: whether its data can be read as texts one by one, which evaluating and exporting do.
    """
    config, folder = shlex.quote(str(yaml or "config.yml")), shlex.quote(output_dir)
    exported = shlex.quote(f"{output_dir.rstrip('/')}-lora")
    yield f"The adapter is in {folder}. What next:"
    if texts:
        yield f"  axolotl evaluate {config} --lora-model-dir {folder}"
    yield f"  axolotl inference {config} --lora-model-dir {folder}"
    yield f"  axolotl qtha-report {folder}"
    yield f"  axolotl qtha-export {config} --out {exported}{'' if texts else ' --calibration FILE'}"
