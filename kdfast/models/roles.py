"""Which network is the student and which the teacher: one rule, by which every method refuses swapped ones.

A student learns, so something of it requires grad. A teacher does not, and is run in evaluation mode. Neither is
changed behind its owner's back: what does not fit is refused, in a sentence that says what to call.
"""

from __future__ import annotations

from torch import nn

__all__ = ["check_networks", "check_student", "check_teacher", "chosen_student", "still_evaluated"]


def _some(names: list[str]) -> str:
    return ", ".join(name or "the network itself" for name in names[:3]) + (", …" if len(names) > 3 else "")


def _check_network(role: str, given: object) -> None:
    if not isinstance(given, nn.Module):
        hint = "; settings are given by name, config=…" if type(given).__name__.endswith("Config") else ""
        raise TypeError(f"{role}: got a {type(given).__name__}, accepted: a network (torch.nn.Module){hint}")


def check_student(student: nn.Module) -> nn.Module:
    """The student, as it is.

    Raises:
        TypeError: It is no network.
        ValueError: No parameter of it requires grad.
    """
    _check_network("student", student)
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            f"student: got a {type(student).__name__} of which no parameter requires grad; a student learns, call "
            "student.requires_grad_(True), or give student first and teacher second"
        )
    return student


def check_teacher(teacher: nn.Module) -> nn.Module:
    """The teacher, as it is.

    Raises:
        TypeError: It is no network.
        ValueError: Parameters of it require grad, or modules of it are in training mode.
    """
    _check_network("teacher", teacher)
    wanting = [name for name, p in teacher.named_parameters() if p.requires_grad]
    if wanting:
        raise ValueError(
            f"teacher: {len(wanting)} of its parameters require grad ({_some(wanting)}); a teacher does not learn, "
            "call teacher.requires_grad_(False)"
        )
    training = [name for name, module in teacher.named_modules() if module.training]
    if training:
        raise ValueError(
            f"teacher: {len(training)} of its modules are in training mode ({_some(training)}); a teacher is "
            "evaluated, call teacher.eval()"
        )
    return teacher


def still_evaluated(teacher: nn.Module) -> nn.Module:
    """The teacher, before a pass of it: a wrapper that holds it may have put it into training mode since.

    One flag is looked at, so that a step costs nothing: ``train()`` of whatever holds it reaches the network itself.

    Raises:
        ValueError: It is in training mode: its batch norms would move, and its answers depend on the batch.
    """
    return check_teacher(teacher) if teacher.training else teacher


def check_networks(student: nn.Module | None, teacher: nn.Module | None) -> None:
    """:func:`check_student` and :func:`check_teacher` of those that are given.

    Raises:
        TypeError, ValueError: See there.
    """
    # What is no network at all is told of first: a slip in one often hides behind the other's training mode.
    for role, given in (("student", student), ("teacher", teacher)):
        if given is not None:
            _check_network(role, given)
    if teacher is not None:
        check_teacher(teacher)
    if student is not None:
        check_student(student)


def chosen_student(given: nn.Module | None, own: nn.Module | None) -> nn.Module:
    """The student of one call: the one given there, else the one that the method was made with.

    Raises:
        ValueError: There is neither, or no parameter of it requires grad.
    """
    student = own if given is None else given
    if student is None:
        raise ValueError("student: got None, accepted: a network, here or when the method is made")
    return check_student(student)
