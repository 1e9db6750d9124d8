"""Read a declarative Jenkinsfile with a Groovy grammar, and refuse whatever is not known to be right.

Jenkins would say the same only when it runs it: a misspelt directive is good Groovy.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import tree_sitter
import tree_sitter_groovy

GROOVY: Final = tree_sitter.Language(tree_sitter_groovy.language())
OPTIONS: Final = {"buildDiscarder", "disableConcurrentBuilds", "timeout", "timestamps"}
STAGE_OPTIONS: Final = {"timeout"}
CONDITIONS: Final = {"always", "success", "failure", "aborted", "unstable", "unsuccessful", "cleanup"}
# What may follow a stage, beside make verbs, and what it takes.
REPORTS: Final = {
    "junit": {"testResults", "allowEmptyResults"},
    "archiveArtifacts": {"artifacts", "allowEmptyArchive"},
}


class PipelineError(Exception):
    """What Jenkins would refuse, or what this project does not do; the message says where and what."""


@dataclass(frozen=True)
class Call:
    """A word of Groovy with what follows it: `name(arguments, key: value) { body }`."""

    line: int
    name: str
    arguments: tuple[object, ...] = ()
    keywords: dict[str, object] = field(default_factory=dict)
    body: tuple["Call", ...] | None = None


@dataclass(frozen=True)
class Stage:
    """A stage: one command, or stages inside; and what follows it, by condition."""

    name: str
    timeout: bool
    command: str | None
    stages: tuple["Stage", ...]
    post: dict[str, tuple[Call, ...]]


@dataclass(frozen=True)
class Pipeline:
    """The options by name, and the stages in order."""

    options: dict[str, Call]
    stages: tuple[Stage, ...]


def parse(text: str) -> tree_sitter.Node:
    """Return the tree of a Groovy text."""
    # The grammar does not know an empty text in single quotes.
    text = re.sub(r"(?<![\\'])''(?!')", '""', text)
    root = tree_sitter.Parser(GROOVY).parse(text.encode()).root_node
    for node in walk(root):
        if node.is_error or node.is_missing:
            raise PipelineError(f"line {node.start_point.row + 1}: this is no Groovy: {source(node)[:60]!r}")
    return root


def walk(node: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    """Return a node and all below it."""
    yield node
    for child in node.children:
        yield from walk(child)


def source(node: tree_sitter.Node) -> str:
    """Return the text of a node."""
    return (node.text or b"").decode()


def value(node: tree_sitter.Node) -> object:
    """Return an argument: a text, number or truth value, or a call."""
    match node.type:
        case "character_literal":
            return source(node)[1:-1]
        case "decimal_integer_literal":
            return int(source(node))
        case "true" | "false":
            return node.type == "true"
        case "method_invocation" | "juxt_function_call":
            return call(node)
    # A text in double quotes may hold a variable, which only the build knows.
    raise PipelineError(f"line {node.start_point.row + 1}: not a plain value: {source(node)}")


def call(node: tree_sitter.Node) -> Call:
    """Return a statement that is a call, as every one of a declarative pipeline is."""
    line = node.start_point.row + 1
    if node.type == "expression_statement" and node.named_child_count == 1:
        return call(node.named_children[0])
    if node.type == "local_variable_declaration":  # `agent any` looks like one
        words = source(node).split()
        if len(words) == 2:
            return Call(line, words[0], (words[1],))
    if node.type not in {"method_invocation", "juxt_function_call"}:
        raise PipelineError(f"line {line}: not a directive: {source(node)[:60]!r}")
    name, *rest = node.named_children
    arguments: list[object] = []
    keywords: dict[str, object] = {}
    body = None
    for part in rest:
        if part.type == "closure":
            body = statements(part)
            continue
        for item in part.named_children:
            if item.type == "map_item":
                key, content = item.named_children
                keywords[source(key)] = value(content)
            else:
                arguments.append(value(item))
    return Call(line, source(name), tuple(arguments), keywords, body)


def statements(node: tree_sitter.Node) -> tuple[Call, ...]:
    """Return the calls of a body in order."""
    return tuple(call(child) for child in node.named_children if not child.type.endswith("comment"))


def section(calls: tuple[Call, ...], where: str, known: set[str]) -> dict[str, Call]:
    """Return calls by name: each known, and there once."""
    found: dict[str, Call] = {}
    for each in calls:
        if each.name not in known or each.name in found:
            raise PipelineError(f"line {each.line}: {where} cannot have {each.name} here")
        found[each.name] = each
    return found


def verb(step: Call) -> str:
    """Return the command of a step that is a make verb."""
    match step:
        case Call(name="sh", arguments=(str(command),), keywords={}, body=None):
            words = command.split(" ")
            if words[:1] == ["make"] and len(words) == 2 and words[1].isalpha():
                return command
    raise PipelineError(f"line {step.line}: a stage is exactly one sh 'make VERB'")


def post(block: Call) -> dict[str, tuple[Call, ...]]:
    """Return the steps of a `post` by condition."""
    found = section(block.body or (), "post", CONDITIONS)
    for condition in found.values():
        for step in condition.body or ():
            if step.name == "sh":
                verb(step)
            elif (
                step.arguments
                or set(step.keywords) - REPORTS.get(step.name, set())
                or step.name not in REPORTS
            ):
                raise PipelineError(f"line {step.line}: post cannot have {step.name} so")
    return {name: condition.body or () for name, condition in found.items()}


def stage(each: Call) -> Stage:
    """Return a stage."""
    if each.name != "stage" or len(each.arguments) != 1 or each.keywords or not each.body:
        raise PipelineError(f"line {each.line}: not a stage: {each.name}")
    parts = section(each.body, "a stage", {"options", "steps", "stages", "post"})
    if ("steps" in parts) == ("stages" in parts):
        raise PipelineError(f"line {each.line}: a stage has either steps or stages")
    steps = (parts["steps"].body or ()) if "steps" in parts else ()
    if "steps" in parts and len(steps) != 1:
        raise PipelineError(f"line {each.line}: a stage is exactly one sh 'make VERB'")
    options = (
        section(parts["options"].body or (), "a stage's options", STAGE_OPTIONS) if "options" in parts else {}
    )
    return Stage(
        name=str(each.arguments[0]),
        timeout="timeout" in options,
        command=verb(steps[0]) if steps else None,
        stages=tuple(map(stage, parts["stages"].body or ())) if "stages" in parts else (),
        post=post(parts["post"]) if "post" in parts else {},
    )


def read(text: str) -> Pipeline:
    """Return the pipeline that a Jenkinsfile describes; a PipelineError where it is not one of ours."""
    top = statements(parse(text))
    if [each.name for each in top] != ["pipeline"]:
        raise PipelineError("a Jenkinsfile is one pipeline { }")
    parts = section(top[0].body or (), "a pipeline", {"agent", "options", "stages"})
    if missing := {"agent", "options", "stages"} - set(parts):
        raise PipelineError(f"the pipeline lacks {missing}")
    return Pipeline(
        options=section(parts["options"].body or (), "options", OPTIONS),
        stages=tuple(map(stage, parts["stages"].body or ())),
    )


def load(path: Path) -> Pipeline:
    """Return the pipeline of a file."""
    return read(path.read_text(encoding="utf-8"))
