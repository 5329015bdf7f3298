"""What the journal says of a job and of a session; whoever wrote it, what cannot be is refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

OPEN = ("intent", "submitted")
ENDED = ("done", "failed", "cancelled", "lost")
MOST_SECONDS = 1e7  # of one job or session, which a third of a year on a device would be


Seconds = Annotated[float, Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False)]  # of a QPU
Count = Annotated[int, Field(ge=1)]
Tag = Annotated[str, Field(pattern=r"^[\w-]+$")]  # names files
STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(config=STRICT)
class Entry:
    """One job, as the last of its events left it; whoever wrote them, what cannot be is refused.

    Raises:
        pydantic.ValidationError: a ValueError, if a value is of another type or out of range.
    """

    tag: Tag
    state: str
    local: bool
    backend: str
    calibration: str
    circuit: str  # digest of the ISA circuit
    angles: str  # digest of all angles
    circuits: Count
    estimate: Seconds
    reserved: Seconds  # after which IBM stops it
    options: dict[str, Any]
    session: str | None = None
    pack: Count = 1  # of our circuits in each of the device's; `circuits` counts the device's
    made: Tag | None = None  # names the file that says how; None: of an earlier version
    seed: int | None = None  # of the shots of a simulated device
    adapter: Tag | None = None  # SHA-256 of the evaluated adapter's weights
    metadata: dict[str, Any] | None = None  # of the result, as the device gave it
    job_id: str | None = None
    qpu_seconds: Seconds | None = None  # None: not known
    reason: str | None = None
    time: float = 0.0  # of the last event, seconds since 1970


@dataclass(config=STRICT)
class Session:
    """A session, as the last of its events left it."""

    session: str
    reserved: Seconds
    qpu_seconds: Seconds | None = None  # None: not billed yet
    time: float = 0.0
