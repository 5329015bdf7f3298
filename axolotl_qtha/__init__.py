"""QTHA (Quantum Tensor Hybrid Adaptation, arXiv 2503.12790) for Axolotl and PEFT.

Importing this package registers the `QTHA` method with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
`AutoPeftModelForCausalLM` know it. It imports neither Axolotl nor Qiskit, and starts no CUDA context.
"""

from typing import TYPE_CHECKING, Any

from .tuner.config import QTHAConfig
from .tuner.model import QTHAModel, register
from .version import __version__

if TYPE_CHECKING:
    from .plugin import QTHAPlugin

__all__ = ["QTHAConfig", "QTHAModel", "QTHAPlugin", "__version__"]

register()


def __getattr__(name: str) -> Any:
    """Import the plugin on first use: the PEFT method works where Axolotl is not installed."""
    if name == "QTHAPlugin":
        from .plugin import QTHAPlugin

        return QTHAPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
