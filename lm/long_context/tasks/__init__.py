# SPDX-License-Identifier: Apache-2.0
"""Long-context tasks generated offline: RULER's and InfiniteBench's, by their published rules.

Counts, ranges, insertion and scoring are published; the wording is ours, so scores compare with
each other and not with published tables.
"""

from lm.errors import UserError
from lm.long_context.tasks import frequency, keys, niah, reckoning, variables
from lm.long_context.tasks.task import Document, Question, Request, Task

__all__ = ["TASKS", "Document", "Question", "Request", "Task", "find"]

TASKS: dict[str, Task] = {
    task.name: task
    for module in (niah, variables, frequency, keys, reckoning)
    for task in module.TASKS
}


def find(name: str) -> Task:
    """A task by name. Raises UserError, naming all."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
