"""What must be refused before Axolotl writes its configuration into logs: it may be a credential.

Axolotl shows plugins the YAML as it stands, then has pydantic check it, whose errors print what they were given, and logs all of
it. So whatever may be a credential in the wrong place is refused here, by its key and type: unknown keys, the whole of `ibm:`,
and `quantum_backend:`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError

from ..circuit.simulation import Backend
from ..errors import Hidden, PrivateSettings, key_shown, refusal, unknown_keys
from ..ibm.options import IBMOptions, refuse_secrets
from ..tuner.arguments import check_choice, refuse_unknown
from ..tuner.share import Share

# Keys of the `qtha:` block that are looked for outside it: Axolotl would leave them out without a word.
ELSEWHERE = {"ibm": "`qtha: {ibm: {...}}`", "quantum_backend": "`qtha: {quantum_backend: ...}`"}


def refuse_misplaced(data: Any) -> None:
    """Refuse keys beside the `qtha:` block that belong into it, or look like an account with IBM.

    Args:
        data: Axolotl's configuration as the YAML has it.

    Raises:
        PrivateSettings: naming the key, the type of its value, and the place where it belongs.
    """
    for key, value in data.items() if isinstance(data, dict) else ():
        name = str(key).lower()
        if name in ELSEWHERE and value is not None:
            refuse_secrets(value, str(key))
            raise PrivateSettings(f"{key}: {Hidden(value)} stands beside the `qtha:` block. What works: {ELSEWHERE[name]}.")
        if name.startswith(("ibm", "qiskit")) and value is not None:
            refuse_secrets({key: value}, "the YAML")
            raise PrivateSettings(f"{key_shown(key)}: {Hidden(value)} is no key of Axolotl's. What works: {ELSEWHERE['ibm']}.")


def refuse_private(block: Any, known: Iterable[str]) -> None:
    """Refuse what may be a credential in a `qtha:` block, without showing it.

    Args:
        block: the value of `qtha:`, as the YAML has it or checked already.
        known: the keys that the block has.

    Raises:
        PrivateSettings: naming the key, the type of its value, and what works.
    """
    if block is None or isinstance(block, BaseModel):  # checked before
        return
    if not isinstance(block, dict):
        raise PrivateSettings(f"qtha: {Hidden(block)} is no block of keys. What works: `qtha: {{rank: 8}}`.")
    refuse_secrets(block, "qtha")
    try:
        refuse_unknown(block, known, "the `qtha:` block")
        for key, value, works in unknown_keys(block.get("share"), Share.model_fields):
            raise refusal(f"share.{key}", value, "is not a key of the `share:` block", works)
        if "quantum_backend" in block:
            check_choice("quantum_backend", block["quantum_backend"], get_args(Backend))
        if block.get("ibm") is not None:
            IBMOptions.model_validate(block["ibm"])
    except ValidationError as error:
        raise PrivateSettings("; ".join(map(_fault, error.errors(include_input=False)))) from None
    except ValueError as error:
        raise PrivateSettings(str(error)) from None


def hide_instance(block: Any) -> None:
    """Put the instance of a checked `qtha:` block where errors and logs do not show it."""
    ibm = block.get("ibm") if isinstance(block, dict) else None
    if isinstance(ibm, dict) and isinstance(ibm.get("instance"), str):
        ibm["instance"] = SecretStr(ibm["instance"])


def _fault(fault: Any) -> str:
    """Return one fault of the `ibm:` block in words, without the value."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    if message.startswith("qtha."):  # our own
        return message
    key, *_ = fault["loc"]
    works = IBMOptions.model_fields[key].description
    return f"qtha.ibm.{key} (value not shown): {message}. What works: {works}"
