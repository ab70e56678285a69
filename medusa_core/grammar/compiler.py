"""From a request's grammar to a matcher, which says what tokens may come next (llguidance).

What a grammar may cost is bounded by llguidance's own limits, and here where it has none. Both count work rather than time, so
that a grammar is refused or not whatever else the machine does. Grammars are compiled by the thread that runs the steps: within the
limits that takes 60 ms at most (a schema of a thousand optional properties), and less than one for most.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from medusa_core.errors import InvalidParameterError, UnsupportedParameterError
from medusa_core.params import Grammar

MAX_GRAMMAR_CHARS = 65_536
# llguidance follows a multiple digit by digit, with a state for each remainder: 30 ms for this number, minutes for millions.
_MAX_MULTIPLE = 10_000
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*(-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)')
# Keys of an object in a schema: compiling it takes the square of their number, 70 ms for these. Of several the squares are summed.
_MAX_KEYS = 1_000
_EMBEDDED_SCHEMA = re.compile(r"%json\s*")
# Rules in Lark's notation: 30 ms for these, and more than in proportion for more.
_MAX_LARK_RULES = 1_000
_LARK_RULE = re.compile(r"^[^\S\n]*[?!]?\w+(?:\.-?[0-9]+)?(?:\[[^\]\n]*\])?\s*:", re.MULTILINE)
# Rules in llama.cpp's notation: it takes the square of their number to translate them.
_MAX_GBNF_RULES = 500
# Compiled grammars kept for later requests, the recently used ones, each with so many matchers.
_MAX_COMPILED = 16
_MAX_IDLE = 16
# What a lane may wait for a matcher of its own.
_MAX_COMPILE_S = 0.02
# Between tokens of JSON: as models write it, on one line or indented, but never so much that a model which does not know how to go
# on could write space for ever.
_JSON_SPACE = r"[ \n\r\t]{0,40}"
# Fractions of llguidance's defaults, with which a hostile regular expression takes half a second per mask. These leave a tenth.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=150_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)

# Tokens that may stand in a string are allowed together, by length; where fewer characters may follow, each token is looked at.
# Beside the library's own lengths of 10, 30 and any, these halve what a mask takes in strings of limited length.
_STRING_SLICES = [r'[^"\\\x00-\x1F\x7F]' + lengths for lengths in ("{1,3}", "{1,6}", "{1,10}", "{1,16}", "{1,30}", "+")]
_SLICES = [r"[\x20\x0A\x0D\x09]+", *_STRING_SLICES]

# Where only one text can come next, llguidance would take the tokens that the tokenizer makes of it: special ones, if it is spelt
# like them. The last such line counts.
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'


def check_grammar(grammar: Grammar) -> None:
    """Find out what is wrong with a grammar as far as that can be told without a vocabulary. Raises InvalidParameterError."""
    _refuse_if(LLMatcher.validate_grammar(_source(grammar), limits=_LIMITS), grammar)


def vocabulary(hf_tokenizer: Any, num_tokens: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokens as llguidance knows them. Takes a second for 150,000 of them.

    hf_tokenizer: of transformers, backed by the tokenizers library. num_tokens: width of the logits. Raises ValueError.
    """
    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("it is not backed by the tokenizers library")
    if not eos_token_ids:
        raise ValueError("the model has no EOS token, so that no output could end")
    num_tokens = max(num_tokens, len(hf_tokenizer))
    return LLTokenizer(backend.to_str(), n_vocab=num_tokens, eos_token=list(eos_token_ids), slices=_SLICES)


@dataclass(slots=True)
class _Compiled:
    """Matchers before the first token. idle: those that were lent and have come back. compile_s: seconds that making one takes."""

    first: LLMatcher
    compile_s: float
    idle: list[LLMatcher] = field(default_factory=list)


class GrammarCompiler:
    """Makes matchers for one vocabulary. Thread-safe: masks are made while requests come and go.

    load_vocabulary: called for the first grammar, so that an engine without any does not pay for it; may raise ValueError.
    """

    def __init__(self, load_vocabulary: Callable[[], LLTokenizer]) -> None:
        self._load_vocabulary = load_vocabulary
        self._vocabulary: LLTokenizer | ValueError | None = None
        self._compiled: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self._lock = Lock()

    @property
    def num_tokens(self) -> int:
        """Width of a mask, once there is a matcher. The tokenizer may know more tokens than the logits have."""
        assert isinstance(self._vocabulary, LLTokenizer)
        return int(self._vocabulary.vocab_size)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher before the first token.

        Those of one grammar are copies of each other and share what they learn about its lexer: they have to take turns, and what a
        lexer may learn has a limit.

        Raises InvalidParameterError for a grammar that is wrong or beyond the limits, UnsupportedParameterError where the model's
        tokenizer cannot be used.
        """
        with self._lock:
            return self._entry(grammar).first.deep_copy()

    def lend(self, grammar: Grammar, *, is_fresh: bool = False) -> LLMatcher:
        """A matcher before the first token, to be copied and left there. Its copies share what they learn about the lexer, and wait
        for no others unless making one is expensive.

        is_fresh: one that has learnt nothing yet. Raises what `compile` raises.
        """
        with self._lock:
            if is_fresh:
                self._compiled.pop((grammar.kind, grammar.text), None)
            entry = self._entry(grammar)
            if entry.idle:
                return entry.idle.pop()
            return self._compile(grammar) if entry.compile_s < _MAX_COMPILE_S else entry.first.deep_copy()

    def take_back(self, grammar: Grammar, matcher: LLMatcher) -> None:
        """Keep a matcher that was lent for the next lane with this grammar: it knows the lexer already.

        To reset one that has moved would not do (see lanes._Job).
        """
        with self._lock:
            entry = self._compiled.get((grammar.kind, grammar.text))
            if entry is not None and len(entry.idle) < _MAX_IDLE and not matcher.is_error():
                entry.idle.append(matcher)

    def _entry(self, grammar: Grammar) -> _Compiled:
        key = (grammar.kind, grammar.text)
        if key not in self._compiled:
            self._tokens(grammar)  # which takes a second the first time
            began_s = time.perf_counter()
            self._compiled[key] = _Compiled(self._compile(grammar), time.perf_counter() - began_s)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _compile(self, grammar: Grammar) -> LLMatcher:
        source, tokens = _source(grammar), self._tokens(grammar)
        matcher = LLMatcher(tokens, source, log_level=0, limits=_LIMITS)
        _refuse_if(matcher.get_error(), grammar)
        # Lexers are built as they are used, so that only the first mask shows what is too much from the start.
        # A copy is asked, as each copy of what was asked would come with the mask.
        asked = matcher.deep_copy()
        mask_W = np.frombuffer(asked.compute_bitmask(), dtype=np.int32)
        _refuse_if(asked.get_error() or ("" if mask_W.any() else "no text matches it"), grammar)
        return matcher

    def _tokens(self, grammar: Grammar) -> LLTokenizer:
        if self._vocabulary is None:
            try:
                self._vocabulary = self._load_vocabulary()
            except ValueError as error:
                self._vocabulary = error
        if isinstance(self._vocabulary, ValueError):
            raise UnsupportedParameterError(
                f"{grammar.field} is not supported with this model's tokenizer: {self._vocabulary}.", param=grammar.field
            )
        return self._vocabulary


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's form. Raises InvalidParameterError."""
    field, text = grammar.field, grammar.text
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidParameterError(
            f"{field} has {len(text)} characters, at most {MAX_GRAMMAR_CHARS} are allowed.", param=field, hint="Make it smaller."
        )
    try:
        text.encode()  # half of a surrogate pair has no UTF-8 form
        _check_cost(grammar)
        match grammar.kind:
            case "json_schema":
                source = _in_lark(LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _JSON_SPACE}))
            case "regex":
                source = _in_lark(LLMatcher.grammar_from_regex(text))
            case "choice":
                source = grammar_from("choice", _checked_choices(text))
            case "cfg":
                # Blank lines mean nothing, and telling the notations apart takes the square of how many follow each other.
                source = grammar_from("grammar", "\n".join(line for line in text.split("\n") if line.strip()))
        return source + _NO_FORCING
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error), grammar) from error


def _in_lark(source: str) -> str:
    """A grammar of one rule, from llguidance's list of grammars."""
    (rule,) = json.loads(source)["grammars"]
    return rule["lark_grammar"] or f"start: %json {json.dumps(rule['json_schema'])}"


def _check_cost(grammar: Grammar) -> None:
    """Raises ValueError."""
    if grammar.kind == "cfg" and grammar.text.count("::=") > _MAX_GBNF_RULES:
        raise ValueError(f"it has more than {_MAX_GBNF_RULES} rules; translate it to Lark's notation")
    if grammar.kind == "cfg" and sum(1 for _ in _LARK_RULE.finditer(grammar.text)) > _MAX_LARK_RULES:
        raise ValueError(f"it has more than {_MAX_LARK_RULES} rules")
    if sum(map(_key_cost, _schemas(grammar))) > _MAX_KEYS**2:
        raise ValueError(f"its objects have too many keys, such as properties: at most {_MAX_KEYS} in one, and fewer in several")
    if grammar.kind in ("cfg", "json_schema"):
        # a grammar may hold a schema; either may spell letters of a key as escapes
        text = re.sub(r"\\u00([0-7][0-9a-fA-F])", lambda match: chr(int(match[1], 16)), grammar.text)
        multiples = [_as_decimal(value) for value in set(_MULTIPLE.findall(text))]
        if any(not 1e-9 <= multiple < 1e9 or _num_decimals(multiple) > 9 for multiple in multiples):
            raise ValueError("multipleOf should be a number between 1e-9 and 1e9, of at most nine decimals")
        # Several may apply to one number. Powers of ten only shift it.
        common = math.lcm(*(int(multiple.scaleb(9)) for multiple in multiples))
        while common % 10 == 0:
            common //= 10
        if common > _MAX_MULTIPLE:
            raise ValueError(f"the least common multiple of all multipleOf, without zeros at its end, is beyond {_MAX_MULTIPLE}")


def _schemas(grammar: Grammar) -> Iterator[Any]:
    """The JSON schemas that it is or holds, as far as they are JSON."""
    starts = {
        "json_schema": [0],
        "cfg": [match.end() for match in _EMBEDDED_SCHEMA.finditer(grammar.text)],
    }.get(grammar.kind, [])
    for start in starts:
        with contextlib.suppress(ValueError):
            yield json.JSONDecoder().raw_decode(grammar.text, start)[0]


def _key_cost(schema: Any) -> int:
    """Sum of the squares of the numbers of keys of all objects in it."""
    cost, rest = 0, [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            cost += len(value) ** 2
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
    return cost


def _as_decimal(text: str) -> Decimal:
    """0, which is no multiple, where a Decimal cannot hold the exponent."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal(0)


def _num_decimals(value: Decimal) -> int:
    exponent = value.normalize().as_tuple().exponent
    assert isinstance(exponent, int)  # text would stand for NaN or infinity
    return max(-exponent, 0)


def _checked_choices(text: str) -> str:
    choices = json.loads(text)
    if not (isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices)):
        raise ValueError("it should be a list of at least one string, none of them empty")
    return text


def _refuse_if(message: str, grammar: Grammar) -> None:
    if message:
        raise _invalid(message, grammar)


def _invalid(message: str, grammar: Grammar) -> InvalidParameterError:
    # llguidance ends its messages with parts that it left out
    reason = message.split("\n<", 1)[0].strip().rstrip(".")
    if reason == "NoExtensionBias":
        reason = "no text matches it"
    return InvalidParameterError(
        f"{grammar.field} cannot be used: {reason[:500]}.",
        param=grammar.field,
        hint="Correct it, or ask for less than it does.",
    )
