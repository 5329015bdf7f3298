"""Tasks that a suite trains on, each with a training, a validation and a test set."""

from .arithmetic import ARITHMETIC
from .domain import DOMAIN
from .high_rank import HIGH_RANK
from .task import Data, Metric, Prepared, Scored, Scoring, Task, prepare

__all__ = ["TASKS", "Data", "Metric", "Prepared", "Scored", "Scoring", "Task", "prepare"]

TASKS = {task.name: task for task in (DOMAIN, ARITHMETIC, HIGH_RANK)}
