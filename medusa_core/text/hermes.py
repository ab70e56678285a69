"""Tool calls as Hermes and Qwen models write them::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Text may stand in front, and further calls behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any, TypeAlias

from medusa_core.text.tool_calls import MAX_NAME_CHARS, TOOL_NAME, CallArguments, CallEvent, CallStart, ToolFunction

OPEN = "<tool_call>"
CLOSE = "</tool_call>"

# Openings of blocks of Markdown.
_BLOCKS = ("```json\n", "```\n")
# What `str.isspace` says of.
_SPACE = r"[\s\x1c-\x1f]"
# How llguidance is to write JSON.
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What decides something is read as one character. What never does, in content or strings, goes through in runs, which is faster.
_SYMBOLS = re.compile(r"""[^\s<>`{}\[\]",:\\]+|.""", re.DOTALL)
# Symbols are sent in. The last one is "", which fits nowhere and so ends what is open.
Steps: TypeAlias = Generator[None, str, None]
StepsToText: TypeAlias = Generator[None, str, str]


def is_hermes(chat_template: str) -> bool:
    """Whether a chat template asks for this format: others use the same marker, around XML."""
    is_xml = any(tag in chat_template for tag in ("<function=", "<arg_key>"))
    return OPEN in chat_template and "arguments" in chat_template and not is_xml


def hermes_grammar(
    functions: Sequence[ToolFunction],
    *,
    is_single: bool,
    has_marker_tokens: bool,
    answer_schema: Mapping[str, Any] | None = None,
    text_tokens: Mapping[int, str] | None = None,
) -> str:
    """Lark text, in the dialect of llguidance, of an answer that is one call of these functions, or one or more.

    has_marker_tokens: the markers are tokens of their own, which llguidance matches as tokens and never as text. answer_schema: the
    answer may also be JSON of this schema. text_tokens: the answer is any text, with any number of calls in it; those are the ids
    and spellings of the tokens that are no plain text and yet may be there. Separators of JSON are those that chat templates print,
    so that there is no white space to go on with for ever.
    """
    open_marker, close_marker = (OPEN, CLOSE) if has_marker_tokens else (json.dumps(OPEN), json.dumps(CLOSE))
    rules = [rf'call: {open_marker} "\n{{\"name\": \"" ({_any_of("call", functions)}) "}}\n" {close_marker}']
    if text_tokens is not None:
        rules += _text_rules(functions, text_tokens, has_marker_tokens=has_marker_tokens)
    else:
        calls = "call" if is_single else 'call ("\\n" call)*'
        rules.append(f"start: {calls}" if answer_schema is None else f"start: {calls} | answer")
    for i, function in enumerate(functions):
        rules.append(rf'call_{i}: "{function.name}\", \"arguments\": " arguments_{i}')
        rules.append(_json_rule(f"arguments_{i}", {"type": "object", **function.parameters}))
    if answer_schema is not None:
        rules.append(_json_rule("answer", answer_schema))
    return "\n".join(rules) + "\n"


def _text_rules(functions: Sequence[ToolFunction], text_tokens: Mapping[int, str], *, has_marker_tokens: bool) -> list[str]:
    """Text in which every call that `HermesParser(is_held=True)` finds has the arguments of its function.

    A head is what a call without marker tokens may begin with, up to its name: at the beginning of the answer, behind a call, or
    behind a marker spelt in text. It is lazy, so that it ends there, and what follows shows whether there was a call.
    """
    breaks = ["call"] if has_marker_tokens else []
    # llguidance takes added tokens for text unless they are spelt like this.
    marks = [i for i, spelling in text_tokens.items() if re.fullmatch("<.*>", spelling) and spelling not in (OPEN, CLOSE)]
    if marks:
        breaks.append(f"<[{','.join(map(str, marks))}]>")
    text = "head* TEXT"
    pieces = ["bare", *([f"{text} ({' | '.join(breaks)})"] if breaks else [])]
    behind_call = rf"({_SPACE}|\}})*((```|<\/tool_call>)({_SPACE}|\}})*)?"
    return [
        f"start: ({' | '.join(pieces)})* {text}",
        "TEXT: /(?s:.*)/",
        f"bare: head+ ({_any_of('bare', functions)}) END" + (f" (SPACE? {CLOSE})?" if has_marker_tokens else ""),
        rf"head[lazy]: /({behind_call}(```(json)?\n)?|(?s:.*)<tool_call>){_SPACE}*\{{{_SPACE}*\"name\"{_SPACE}*:{_SPACE}*\"/",
        rf"BEHIND_NAME: /\"{_SPACE}*,{_SPACE}*\"arguments\"{_SPACE}*:/",
        *(f'name_{i}[lazy]: "{function.name}" BEHIND_NAME' for i, function in enumerate(functions)),
        *(f"bare_{i}: name_{i} SPACE? arguments_{i}" for i in range(len(functions))),
        f"SPACE: /{_SPACE}{{1,40}}/",
        rf"END: /{_SPACE}{{0,40}}\}}/",
    ]


def _any_of(rule: str, functions: Sequence[ToolFunction]) -> str:
    return " | ".join(f"{rule}_{i}" for i in range(len(functions)))


def _json_rule(name: str, schema: Mapping[str, Any]) -> str:
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': _SEPARATORS})}"


def _is_beginning(text: str, markers: Sequence[str]) -> bool:
    # The first question is asked of every symbol of an answer.
    return text[0] in "<`{" and any(marker.startswith(text) for marker in markers)


class _MalformedError(Exception):
    """The next symbol does not continue a call."""


class HermesParser:
    """The parser of one answer.

    A call is certain when its name and the beginning of its arguments are there, in either order, or when its object ends behind
    the name: then it has no arguments. Until then it is held back, and becomes content if it does not go on as a call. From then on
    its arguments are passed on up to the brace that balances their first one, whether or not they are JSON inside. A character
    that JSON has only in strings and that begins a closing marker ends them too.

    Small models leave the markers out, or write a block of Markdown instead. So an object in such a block, or one that the answer
    begins with, is a call too if it names a function that was offered; and so are further ones behind it.

    White space in front of a call belongs to the call, and so does what the last one leaves in front of the end.
    """

    def __init__(self, *, offered: Collection[str] = (), is_single: bool = False, is_held: bool = False) -> None:
        """offered: names of functions, for calls without markers. is_single: the first call is the last. is_held: the text keeps to
        the grammar of text with calls, and what the grammar cannot hold to a schema is no call: one without a marker behind other
        text, without arguments, or with those in front of the name."""
        self._offered = offered
        # Where a line begins, and where the answer or what follows a call does.
        self._line_openings = (OPEN, *_BLOCKS) if offered and not is_held else (OPEN,)
        self._first_openings = (OPEN, *_BLOCKS, "{") if offered else (OPEN,)
        self._is_held = is_held
        self._is_single = is_single
        self._num_started = 0
        self._num_ended = 0
        # What `push` returns next: calls that start, and pieces of content (None) or of the arguments of a call (its index).
        self._told: list[CallStart | tuple[int | None, list[str]]] = []
        # Taken, but not certain.
        self._held: list[str] = []
        # Not taken by any state yet.
        self._next = ""
        self._steps = self._run()
        next(self._steps)

    @property
    def has_calls(self) -> bool:
        return 0 < self._num_started == self._num_ended

    @property
    def is_finished(self) -> bool:
        return self._is_single and self._num_ended > 0

    def push(self, text: str) -> list[str | CallEvent]:
        for symbol in _SYMBOLS.findall(text):
            if self.is_finished:
                break
            self._steps.send(symbol)
        return self._events()

    def flush(self) -> list[str | CallEvent]:
        if not self.is_finished:
            self._steps.send("")
        return self._events()

    def _events(self) -> list[str | CallEvent]:
        told, self._told = self._told, []
        events: list[str | CallEvent] = []
        for item in told:
            if isinstance(item, CallStart):
                events.append(item)
            else:
                index, pieces = item
                text = "".join(pieces)
                events.append(text if index is None else CallArguments(index, text))
        return events

    def _tell(self, pieces: Sequence[str], index: int | None = None) -> None:
        last = self._told[-1] if self._told else None
        if last is None or isinstance(last, CallStart) or last[0] != index:
            last = (index, [])
            self._told.append(last)
        last[1].extend(pieces)

    def _tell_held(self) -> None:
        """As content, after all."""
        if self._held:
            self._tell(self._held)
            self._held.clear()

    def _start(self, name: str) -> int:
        """The call is certain. Returns its index."""
        self._held.clear()
        self._told.append(CallStart(self._num_started, name))
        self._num_started += 1
        return self._num_started - 1

    def _run(self) -> Steps:
        self._next = yield
        openings, closing = self._first_openings, ""
        while True:
            opening = yield from self._read_content(openings, closing)
            try:
                yield from self._read_call(opening)
                openings, closing = self._first_openings, "```" if opening in _BLOCKS else CLOSE
            except _MalformedError:
                # The next symbol is looked at again, as the possible beginning of a call. What is held has none outside strings.
                self._tell_held()
                openings, closing = (OPEN,), ""

    def _hold(self) -> Steps:
        """Take the next symbol, without deciding what it is."""
        self._held.append(self._next)
        self._next = yield

    def _read_content(self, openings: tuple[str, ...], closing: str) -> StepsToText:
        """Up to and with an opening, which is returned, and held together with the white space in front of it.

        openings: those of which one may come next. closing: of the call that has just been read; empty if none has. It belongs to
        the call, and so do braces in front of it: a model may well write one too many.
        """
        is_behind_call = bool(closing)
        marker = ""
        while marker not in openings:
            if self._next and _is_beginning(marker + self._next, (*openings, closing)):
                marker += self._next
                yield from self._hold()
                if marker == closing:
                    self._held.clear()
                    marker, closing = "", ""
            elif marker:
                # None of them; the next symbol is looked at again, as it may begin one.
                self._tell_held()
                marker, closing, openings, is_behind_call = "", "", (OPEN,), False
            elif self._next.isspace():
                if self._next == "\n" and openings == (OPEN,):
                    openings = self._line_openings
                yield from self._hold()
            elif self._next == "}" and closing:
                self._held.clear()
                self._next = yield
            else:
                if self._next:
                    self._held.append(self._next)
                    closing, openings, is_behind_call = "", (OPEN,), False
                if not is_behind_call:
                    self._tell_held()
                self._next = yield
        return marker

    def _read_call(self, opening: str) -> Steps:
        """A call's object, up to the end of its arguments. Raises _MalformedError while nothing is told of it."""
        is_marked = opening == OPEN
        if opening != "{":
            yield from self._take("{")
        key = yield from self._read_word()
        yield from self._take(":")
        if key == "name":
            name = yield from self._read_name(is_marked)
            yield from self._skip_space()
            if self._next == "}" and is_marked and not self._is_held:
                self._tell(["{}"], self._start(name))
                self._num_ended += 1
                return
            yield from self._take(",")
            yield from self._read_key("arguments")
            yield from self._skip_space()
            if self._next != "{":
                raise _MalformedError
            yield from self._read_object(self._start(name))
        elif key == "arguments" and not self._is_held:
            yield from self._skip_space()
            num_before = len(self._held)
            if self._next != "{":
                raise _MalformedError
            yield from self._read_object(None)
            arguments = self._held[num_before:]
            yield from self._take(",")
            yield from self._read_key("name")
            name = yield from self._read_name(is_marked)
            self._tell(arguments, self._start(name))
            self._num_ended += 1
        else:
            raise _MalformedError

    def _skip_space(self) -> Steps:
        while self._next.isspace():
            yield from self._hold()

    def _take(self, symbol: str) -> Steps:
        """One symbol of the format, and the white space in front of it."""
        yield from self._skip_space()
        if self._next != symbol:
            raise _MalformedError
        yield from self._hold()

    def _read_key(self, key: str) -> Steps:
        if (yield from self._read_word()) != key:
            raise _MalformedError
        yield from self._take(":")

    def _read_name(self, is_marked: bool) -> StepsToText:
        name = yield from self._read_word()
        if not (is_marked or name in self._offered):
            raise _MalformedError
        return name

    def _read_word(self) -> StepsToText:
        """A string that may be a name: keys are made of the same characters, and other strings need not be held back for long."""
        yield from self._take('"')
        begin = len(self._held)
        while len(self._held) - begin < MAX_NAME_CHARS and TOOL_NAME.fullmatch(self._next):
            yield from self._hold()
        word = "".join(self._held[begin:])
        if self._next != '"' or not TOOL_NAME.fullmatch(word):
            raise _MalformedError
        yield from self._hold()
        return word

    def _read_object(self, index: int | None) -> Steps:
        """A JSON object as it stands: told as arguments of the call `index`, or held (None) while the call is not certain."""
        depth = 0
        is_string = is_escaped = False
        while True:
            symbol = self._next
            if not symbol or (symbol in "<`" and not is_string):
                if index is None:
                    raise _MalformedError
                self._num_ended += bool(symbol)
                return
            if is_string:
                is_string = is_escaped or symbol != '"'
                is_escaped = symbol == "\\" and not is_escaped
            else:
                is_string = symbol == '"'
                depth += (symbol in "{[") - (symbol in "}]")
            if index is None:
                self._held.append(symbol)
            else:
                self._tell([symbol], index)
            if depth == 0:
                self._num_ended += index is not None
                self._next = yield
                return
            self._next = yield
