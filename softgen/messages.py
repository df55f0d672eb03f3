"""Turning the reports of the argument parser into one line: which key, what was expected, what was got."""

import re
from collections.abc import Sequence
from pathlib import Path

_UNION = "Does not validate against any of the Union subtypes"
_ANOTHER_TYPE = re.compile(r"Expected a <class|Import path \S+ does not correspond to a subclass of")


def reason_of(error: Exception) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def one_line(message: object) -> str:
    """Fold a message of several lines into one: the key, then the reason.

    jsonargparse reports every branch of a union, and of the unions within it; of the reasons, one that says more than
    that another type was expected is kept.
    """
    lines = [line.rstrip() for line in str(message).splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if _UNION in line:
            reasons = _reasons(lines[index + 1 :])
            useful = [reason for reason in reasons if "NoneType" not in reason]
            telling = [reason for reason in useful if not _ANOTHER_TYPE.match(reason)]
            lines = [*lines[:index], *(telling or useful or reasons)[:1]]
            break
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    text = re.sub(r'Parser key "([^"]+)": ?', r"\1: ", text)
    text = re.sub(r"Expected a typing\.Literal\[([^\]]*)\]\.? Got value: (.*)$", r"expected one of \1, got \2", text)
    text = re.sub(r"Expected a <class '(\w+)'>\.? Got value: (.*)$", r"expected \1, got \2", text)
    return re.sub(
        r"Option '([^']+)' is not accepted", r"unknown key: expected an argument of that class, got '\1'", text
    )


def _reasons(lines: Sequence[str]) -> list[str]:
    """Why each branch of a union, and of those within it, did not take the value."""
    reasons: list[str] = []
    is_reason = False
    for line in lines:
        entry = re.match(r"^\s*- (.*)$", line)
        if entry is not None:
            is_reason = _UNION not in line
            reasons += [entry.group(1)] * is_reason
        elif re.match(r"^\s*(Subtypes|Errors|Given value( type)?): ?", line):
            is_reason = False
        elif is_reason:
            reasons[-1] += f"\n{line}"
    return reasons


def locate_unknown_key(message: str, words: Sequence[str]) -> str:
    """Put the whole path of an unknown key before the message.

    Args:
        message: From `one_line`.
        words: The command line, where the key was given, or that names the YAML file where it was.
    """
    unknown = re.search(r"unknown key: .* got '([^']+)'$", message)
    if unknown is None:
        return message
    name = unknown.group(1)
    for word in words:
        key = word.removeprefix("--").split("=")[0]
        if word.startswith("--") and key.split(".")[-1] == name:
            return f"{key}: {message}"
    for path in _config_files(words):
        import yaml

        found = _find_key(yaml.safe_load(path.read_text()), name)
        if found is not None:
            return f"{found} (in {path}): {message}"
    return message


def _config_files(words: Sequence[str]) -> list[Path]:
    following = [words[index + 1] for index, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    given = [word.split("=", 1)[1] for word in words if word.startswith("--config=")]
    return [Path(name) for name in (*following, *given) if Path(name).is_file()]


def _find_key(tree: object, name: str) -> str | None:
    """The dotted path of the first key of that name in nested mappings and lists."""
    children: list[tuple[str, object]] = []
    if isinstance(tree, list):
        children = [(str(index), value) for index, value in enumerate(tree)]
    elif isinstance(tree, dict):
        if name in tree:
            return name
        children = [(str(key), value) for key, value in tree.items()]
    for key, value in children:
        found = _find_key(value, name)
        if found is not None:
            return f"{key}.{found}"
    return None
