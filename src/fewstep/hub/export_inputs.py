"""Further inputs of a student that is exported: what the pipeline's guidance scale drives, and what is constant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fewstep.extras import check_given
from fewstep.hub.adapters import WEIGHT, Adapter
from fewstep.sampling.rollout import Plan, Student
from fewstep.values import real


def with_constants(student: Student, extras: Mapping[str, float]) -> Student:
    """The student with ``extras`` set in every plan; ValueError for an input that it does not take, or a value out of
    range, TypeError for a value that is no single number."""
    constants = {name: real(name, value) for name, value in check_given(student.extras, extras).items()}
    plans = {
        steps: replace(plan, extras={**plan.extras, **constants}) for steps, plan in student.plans.items()
    }  # fmt: skip
    return Student(student.flow_map, plans)


def driven(student: Student, adapter: Adapter | None) -> str | None:
    """The input that the guidance scale of a diffusers pipeline sets: the weight that the network takes, where the
    student declares it; else None."""
    takes = adapter is not None and adapter.takes_guidance
    return WEIGHT if takes and WEIGHT in student.extras else None


def check_carried(student: Student, net: Any, adapter: Adapter | None, telling: Collection[str], pipeline: str) -> None:
    """ValueError for an input that the exported ``pipeline`` can neither set nor keep constant; ``telling`` are the
    pipelines that tell their network the guidance scale."""
    weight = driven(student, adapter)
    if weight is not None and pipeline not in telling:
        raise ValueError(
            f"input {weight} {student.extras[weight]}: {pipeline} does not tell its network the guidance scale; "
            f"{', '.join(telling)} do"
        )
    for name, declared in student.extras.items():
        if name == weight:
            continue
        if adapter is not None:
            takes = f"only {WEIGHT}, its guidance weight" if adapter.takes_guidance else "no further inputs"
            raise ValueError(f"input {name} {declared}: this {type(adapter.model).__name__} takes {takes}")
        if not all(name in plan.extras for plan in student.plans.values()):
            raise ValueError(
                f"input {name} {declared}: nothing in an exported folder can set it; fix it with --extra "
                f"{name}={declared.default:g} (export(.., extras={{'{name}': {declared.default:g}}}))"
            )
        if name not in (taken := net.config["extras"]):
            raise ValueError(f"input {name} {declared}: the network takes {', '.join(taken) or 'no further inputs'}")


def scale_of(student: Student, plan: Plan, adapter: Adapter | None) -> dict[str, float]:
    """The argument of a pipeline's call that sets the driven input as a plan does, or at its default; none without
    one."""
    name = driven(student, adapter)
    if name is None or adapter is None:
        return {}
    value = plan.extras.get(name, student.extras[name].default)
    return {"guidance_scale": value + adapter.guidance_offset}


def notes(student: Student, adapter: Adapter | None) -> list[str]:
    """What the card of an export says about further inputs, in sentences."""
    told = []
    for name, declared in student.extras.items():
        if name == driven(student, adapter) and adapter is not None:
            low, high = (end + adapter.guidance_offset for end in (declared.low, declared.high))
            told.append(f"`guidance_scale` is an input of the student, made for {low:g} to {high:g}.")
            continue
        values = [plan.extras[name] for plan in student.plans.values()]
        if len(set(values)) == 1:
            told.append(f"Its input {name} is {values[0]:g}.")
        else:
            shown = (", ".join(f"{number:g}" for number in numbers) for numbers in (values, student.plans))
            told.append("Its input {} is {} in {} steps.".format(name, *shown))
    return told
