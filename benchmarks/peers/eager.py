"""What frameworks have in common that run a program as they read it."""

from typing import Any

from frameworks import Entry, Program, Task


def program(task: Task, entry: Entry) -> Program:
    return lambda: entry.finish(entry.function(*task.arguments))


def wait(_: Any) -> None:
    """Done when it returns."""


def counting(task: Task) -> Task:
    """The same: what is counted is counted from outside."""
    return task
