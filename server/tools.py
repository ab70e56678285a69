"""What a chat completion's tools mean for the prompt and the answer. Raises RequestError where they cannot be honoured."""

from __future__ import annotations

from typing import Any

from medusa_core.errors import InvalidParameterError, UnsupportedParameterError
from server.protocol.chat import ChatBody
from server.protocol.tools import Tool
from server.serving import ServedModel


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
    """The choice against the tools. Where a call is demanded, only a grammar can promise one."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return
    names = [tool.function.name for tool in body.tools or ()]
    if not names:
        raise InvalidParameterError("tool_choice demands a call, but there are no tools.", param="tool_choice")
    if isinstance(choice, dict) and (name := choice["function"]["name"]) not in names:
        raise InvalidParameterError(f"tool_choice names {name[:64]!r}, which is not among the tools.", param="tool_choice")
    raise UnsupportedParameterError(
        'tool_choice: a call cannot be enforced yet; use "auto" or "none".',
        param="tool_choice",
    )


def _for_template(tool: Tool) -> dict[str, Any]:
    """A tool as models were trained to read it; `strict` is for servers."""
    function = tool.function
    fields: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        fields["description"] = function.description
    fields["parameters"] = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    return {"type": "function", "function": fields}
