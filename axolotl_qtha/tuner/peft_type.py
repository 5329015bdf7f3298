"""The PEFT type of this method.

PEFT keeps its methods in the enum `PeftType` and has no way to add one from outside (huggingface/peft#2273), so the member
is added here, once, at import.
"""

from peft.utils import PeftType


def _extend(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # Python >= 3.12 looks members up as class attributes
    return member


QTHA = _extend("QTHA")
