"""What a chat completion's tools mean for the prompt and the answer. Raises RequestError where they cannot be honoured."""

from __future__ import annotations

import json
from typing import Any

from medusa_core.errors import InvalidParameterError, UnsupportedParameterError
from medusa_core.grammar.compiler import check_grammar
from medusa_core.params import Grammar
from medusa_core.text.tool_calls import ToolFunction
from server.protocol.chat import ChatBody
from server.protocol.tools import Tool
from server.served_model import ServedModel
from server.structured import output_grammar, without_annotations

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def offered_tools(body: ChatBody, model: ServedModel) -> list[dict[str, Any]] | None:
    """The tools as the chat template is given them; None if the model may not call any. Raises RequestError."""
    _check_choice(body)
    return template_tools(body.tools, model) if body.has_callable_tools else None


def template_tools(tools: list[Tool] | None, model: ServedModel) -> list[dict[str, Any]] | None:
    """Any tools as the chat template is given them. Raises UnsupportedParameterError for a model that has no use for them."""
    if not tools:
        return None
    if model.tool_format is None or "tools" not in model.text.chat_template_text:
        raise UnsupportedParameterError(
            "This model cannot be offered tools: its chat template does not print them, or its tool calls are of no known format.",
            hint='Leave tools out, set tool_choice to "none", or start the server with another --tool-call-parser or template.',
            param="tools",
        )
    return [_for_template(tool) for tool in tools]


def _check_choice(body: ChatBody) -> None:
    """The choice against the tools."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return
    names = [tool.function.name for tool in body.tools or ()]
    if not names:
        raise InvalidParameterError("tool_choice demands a call, but there are no tools.", param="tool_choice")
    if isinstance(choice, dict) and (name := _name(choice)) not in names:
        raise InvalidParameterError(f"tool_choice names {name[:64]!r}, which is not among the tools.", param="tool_choice")


def chat_grammar(body: ChatBody, model: ServedModel) -> Grammar | None:
    """What the answer must be a text of, as far as tools and the fields about its form say so. Raises RequestError.

    Where a call is demanded, the answer is calls, and has no content that response_format could be about. Where the model is free
    to call, the answer is calls or what response_format asks for, or any text with calls in it, which has a grammar only for the
    sake of strict functions.
    """
    form = output_grammar(body)
    if (
        not body.has_callable_tools
        or model.tool_format is None
        or (form is None and body.has_free_choice and not body.has_strict_tools)
    ):
        return form
    if body.structured_outputs is not None:
        raise InvalidParameterError(
            "structured_outputs says what form the whole output has, which leaves no room for calls; leave it or tools out.",
            param="structured_outputs",
        )
    choice = body.tool_choice
    is_text = form is None and body.has_free_choice
    try:
        functions = [
            _function(tool, is_held=not is_text or bool(tool.function.strict))
            for tool in body.tools or ()
            if not isinstance(choice, dict) or tool.function.name == _name(choice)
        ]
        text = model.tool_format.grammar(
            functions,
            is_single=body.parallel_tool_calls is False or isinstance(choice, dict),
            has_marker_tokens=len(model.text.encode(model.tool_format.marker, add_special_tokens=False)) == 1,
            answer_schema=json.loads(form.text) if form is not None and body.has_free_choice else None,
            text_tokens=model.text.added_tokens() if is_text else None,
        )
    except RecursionError as error:
        raise InvalidParameterError("Parameters of tools are nested too deeply.", param="tools") from error
    grammar = Grammar(kind="cfg", text=text, field="tools")
    check_grammar(grammar)
    return grammar


def _name(choice: dict[str, Any]) -> str:
    return str(choice["function"]["name"])


def _function(tool: Tool, *, is_held: bool) -> ToolFunction:
    """is_held: to its schema."""
    parameters = tool.function.parameters if is_held else {}
    return ToolFunction(
        name=tool.function.name, parameters=_NO_PARAMETERS if parameters is None else without_annotations(parameters)
    )


def _for_template(tool: Tool) -> dict[str, Any]:
    """A tool as models were trained to read it; `strict` is for servers."""
    function = tool.function
    fields: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        fields["description"] = function.description
    fields["parameters"] = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    return {"type": "function", "function": fields}
