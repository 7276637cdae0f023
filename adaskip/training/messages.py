"""Conversations as users write them: checked turn by turn, and their pictures taken out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaskip.errors import did_you_mean
from adaskip.training.pictures import pictures_of
from adaskip.training.values import named, text_fault

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]
_TURN = '{"role": "user", "content": "..."}'
_PICTURES = ("image", "image_url", "url", "path")  # where a part of type image or image_url keeps its picture


def read_messages(messages: Any, images: Sequence[Any], answers: bool) -> tuple[list[Message], list[Any], list[str]]:
    """Return a conversation in which each content is a list of parts, its pictures in order, and what is wrong with it.

    A part is ``{"type": "text", "text": ...}`` or ``{"type": "image"}``. What stands behind the last answer is left
    out, as nothing is learned from it. Where pictures stand beside the conversation and no part says where they belong,
    they open the first turn of the user.

    Args:
        messages: ``[{"role": ..., "content": text or a list of parts}, ...]``, as chat programs write them.
        images: pictures that stand beside it, for parts that name none.
        answers: whether a turn of the assistant is needed.
    """
    if not isinstance(messages, list) or not messages:
        return [], [], [f" is {named(messages)}; expected a list of turns such as {_TURN}"]
    turns: list[Message] = []
    pictures: list[Any] = []
    faults: list[str] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            faults.append(f"[{index}] is {named(message)}; expected a turn such as {_TURN}")
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            hint = f"; {did_you_mean(role, ROLES)}" if isinstance(role, str) and role else ""
            faults.append(f"[{index}].role is {named(role)}; expected {' | '.join(ROLES)}{hint}")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            faults.append(f"[{index}].content is {named(content)}; expected text or a list of parts")
            continue
        faults += [f"[{index}].content{fault}" for fault in _part_faults(parts, role == "assistant")]
        turns.append({"role": role, "content": [_bare(part) for part in parts]})
        pictures += [_picture(part) for part in parts if _shows(part)]
    if not faults:
        turns = _ended(turns)
        faults += _order_faults(turns, answers)
    if not faults:
        pictures, fault = _matched(turns, pictures, [*images])
        faults += [fault] if fault else []
    return turns, pictures, faults


def is_pictured(record: Mapping[str, Any]) -> bool:
    """Return whether a record has pictures, beside its text or in its conversation."""
    messages = record.get("messages")
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    contents = [content for turn in turns if isinstance(content := turn.get("content"), list)]
    return bool(pictures_of(record)) or any(_shows(part) for content in contents for part in content)


def text_of(message: Message) -> str:
    """Return the text of a turn, without its pictures."""
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def first_answer(messages: Sequence[Message]) -> int:
    """Return the number of the first turn of the assistant; how many turns there are where none is his."""
    return next((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), len(messages))


def _part_faults(parts: list[Any], answer: bool) -> Iterator[str]:
    for place, part in enumerate(parts):
        at = f"[{place}]" if len(parts) > 1 else ""
        if not isinstance(part, dict):
            yield f'{at} is {named(part)}; expected a part such as {{"type": "text", "text": "..."}}'
        elif part.get("type") == "text":
            # beside a picture a turn may be without words
            if (fault := text_fault(part.get("text"))) and (answer or len(parts) == 1 or part.get("text") != ""):
                yield f"{at} {fault}"
        elif not _shows(part):
            yield f"{at} is a part of type {named(part.get('type'))}; expected text | image"
        elif answer:
            yield f"{at} shows a picture in an answer; expected text"


def _order_faults(turns: Sequence[Message], answers: bool) -> Iterator[str]:
    first = first_answer(turns)
    if not any(turn["role"] == "user" for turn in turns[:first]):
        yield " begins with an answer; expected a turn of the user before it" if turns else " holds no turn"
    elif answers and first == len(turns):
        yield " holds no turn of the assistant; expected one to learn from"
    if any(_shows(part) for turn in turns[first:] for part in turn["content"]):
        yield (
            " shows a picture behind the first answer; expected all pictures before it: give each question with a "
            "picture a row of its own"
        )


def _ended(turns: list[Message]) -> list[Message]:
    """Leave out what stands behind the last answer."""
    answered = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return turns[: answered[-1] + 1] if answered else turns


def _matched(turns: list[Message], own: list[Any], beside: list[Any]) -> tuple[list[Any], str | None]:
    """Give each part of a picture its picture, its own or the next one that stands beside the conversation."""
    shown = sum(_shows(part) for turn in turns for part in turn["content"])
    own = own[:shown]
    if not shown and beside:
        user = next(turn for turn in turns if turn["role"] == "user")
        user["content"] = [*({"type": "image"} for _ in beside), *user["content"]]
        return beside, None
    if (bare := sum(picture is None for picture in own)) != len(beside):
        numbers = f"{bare} parts of type image without a picture of their own, and {len(beside)} in image"
        return [], f" holds {numbers}; expected as many of the one as of the other"
    rest = iter(beside)
    return [next(rest) if picture is None else picture for picture in own], None


def _shows(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _bare(part: Any) -> Any:
    """Return a part without its picture, and without what tables put in for want of a value."""
    if _shows(part):
        return {"type": "image"}
    return {"type": "text", "text": part.get("text")} if isinstance(part, dict) else part


def _picture(part: dict[str, Any]) -> Any:
    value = next((part[name] for name in _PICTURES if part.get(name) not in (None, "")), None)
    return value["url"] if isinstance(value, dict) and "url" in value else value
