"""From the fields of a body to the grammar of its output."""

from __future__ import annotations

import json
from typing import Any

from medusa_core.errors import InvalidParameterError
from medusa_core.grammar.compiler import check_grammar
from medusa_core.params import Grammar
from server.protocol.common import GenerationBody, ResponseFormat, StructuredOutputs

_ANY_OBJECT = '{"type": "object"}'
# What schemas say to people and models alone.
_ANNOTATIONS = ("title", "description", "$comment")
# Keywords that hold schemas under names of the caller's, and those that hold values.
_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = ("const", "enum")


def output_grammar(body: GenerationBody) -> Grammar | None:
    """What the output must be a text of; None if it is free.

    Raises InvalidParameterError, naming the field, for contradictions and for what is wrong in the grammar itself.
    """
    grammar = None if body.response_format is None else _of_response_format(body.response_format)
    if body.structured_outputs is not None:
        if grammar is not None:
            raise InvalidParameterError(
                "structured_outputs and response_format both say what form the output has; leave one of them out.",
                param="structured_outputs",
            )
        grammar = _of_structured_outputs(body.structured_outputs)
    if grammar is not None:
        check_grammar(grammar)
    return grammar


def _of_response_format(asked: ResponseFormat) -> Grammar | None:
    if (asked.type == "json_schema") != (asked.json_schema is not None):
        raise InvalidParameterError(
            'response_format.json_schema holds the schema of type "json_schema", and belongs to no other type.',
            param="response_format.json_schema",
        )
    if asked.json_schema is not None:
        return _schema_grammar(asked.json_schema.json_schema, "response_format.json_schema.schema")
    if asked.type == "json_object":
        return Grammar(kind="json_schema", text=_ANY_OBJECT, field="response_format")
    return None


def _of_structured_outputs(asked: StructuredOutputs) -> Grammar:
    grammars: list[Grammar] = []
    if asked.json_schema is not None:
        grammars.append(_schema_grammar(asked.json_schema, "structured_outputs.json"))
    if asked.regex is not None:
        grammars.append(Grammar(kind="regex", text=asked.regex, field="structured_outputs.regex"))
    if asked.choice is not None:
        grammars.append(Grammar(kind="choice", text=json.dumps(asked.choice), field="structured_outputs.choice"))
    if asked.grammar is not None:
        grammars.append(Grammar(kind="cfg", text=asked.grammar, field="structured_outputs.grammar"))
    if asked.json_object:
        grammars.append(Grammar(kind="json_schema", text=_ANY_OBJECT, field="structured_outputs.json_object"))
    if len(grammars) != 1:
        raise InvalidParameterError(
            f"structured_outputs needs exactly one of json, regex, choice, grammar and json_object, got {len(grammars)}.",
            param="structured_outputs",
        )
    return grammars[0]


def _schema_grammar(schema: dict[str, Any] | str, field: str) -> Grammar:
    if isinstance(schema, dict):
        try:
            schema = json.dumps(without_annotations(schema), ensure_ascii=False)
        except RecursionError as error:
            raise InvalidParameterError(f"{field} is nested too deeply.", param=field) from error
    return Grammar(kind="json_schema", text=schema, field=field)


def without_annotations(schema: Any) -> Any:
    """A schema that takes the same values. Descriptions are most of many a tool, and a grammar's length is limited.

    Raises RecursionError.
    """
    if isinstance(schema, list):
        return [without_annotations(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rest: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            rest[key] = {name: without_annotations(inner) for name, inner in value.items()}
        elif key in _VALUES:
            rest[key] = value
        elif not (key in _ANNOTATIONS and isinstance(value, str)):
            rest[key] = without_annotations(value)
    return rest
