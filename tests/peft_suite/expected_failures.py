"""PEFT's generic cases that fail with QTHA, and why each is to fail. Nothing else may, and none of these may pass unnoticed."""

from typing import NamedTuple


class Expected(NamedTuple):
    """Failures of one reason."""

    tests: str  # regular expression for names of tests, without the case
    case: str  # of the case, in square brackets after the name
    error: str  # searched in the error
    reason: str


MERGES = (
    "test_merge_layers|test_merge_layers_multi|test_merge_layers_nan|test_merge_layers_fp16|test_merge_layers_is_idempotent|"
    "test_safe_merge|test_disable_adapters_with_merging|test_multiple_active_adapters_merge_and_unmerge|"
    "test_forward_b?float16(_no_autocast)?"
)

EXPECTED = (
    Expected(MERGES, r"Circuit", r"is not linear in x: no merged weight equals it", "an adapter with a circuit cannot be merged"),
    Expected(
        "test_merge_layers_nan",
        r"Linear",
        r"(?s)NaNs detected in the merged weights.*gives NaN or infinite weights",
        "the merge is refused as PEFT's case wants, in other words",
    ),
    Expected(
        "test_only_params_are_updated|test_parameters_after_loading_model",
        r"Vanilla MLP",
        r"NonFiniteAngle|IncompleteAdapter.*holds NaN or infinite values",
        "SGD at 0.5 on inputs up to 89, for which PEFT's cases have lower rates for eight of its methods, too; said, not saved",
    ),
    Expected(
        "test_adding_multiple_adapters_with_bias_raises",
        r"",
        r"qtha\.bias: \(str, value not shown\) is LoRA's, and not known to QTHAConfig",
        "biases stay frozen, so QTHA refuses the argument by itself, before a second adapter could",
    ),
    Expected(
        "test_multiple_active_adapters_with_overlapping_modules_to_save_raises",
        r"",
        r"'0layers\.\.lin0' matches no module of the model",
        "a typing error in PEFT's case, which QTHA refuses and PEFT's methods pass over",
    ),
)
