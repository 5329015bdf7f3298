"""What the tests of the export share: trained tiny models, and text for them."""

import torch

from axolotl_qtha.trained.calibration_text import Sequence, batches
from axolotl_qtha.trained.passes import Pass, adapters_of

from .models import VOCABULARY


def sequences(count=24, seed=1):
    """Return sequences of 5 to 20 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 21, (count,), generator=generator).tolist()
    ids = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Sequence(row, row) for row in ids]


def text_pass(model, text=None, most=64):
    """Return a run of text through a model."""
    text = sequences() if text is None else text
    return Pass(model, adapters_of(model), lambda: batches(text, most, 0), len(list(batches(text, most, 0))))
