"""Fields and answer parts that both generation endpoints share.

Bodies are validated strictly: "1" is not a number and 1.0 is not an integer. Types only: ranges of sampling parameters are
checked by `SamplingParams`, where `medusa generate` meets them too. `null` means the field's default. Fields that the API has and
this version does not are declared with `only(...)`, which lets their neutral values pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from medusa_core.params import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

MAX_STOP_STRINGS = 4
# Each is looked for behind every token.
MAX_STOP_CHARS = 1_000
# They travel to the device with the request.
MAX_BIASES = 1_024
# Longer than any token id, short enough to be an int32.
_MAX_ID_DIGITS = 9

# Wider integers would not fit the messages to the engine.
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
NumTokens = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True, eq=False, slots=True)
class Described:
    """Keywords of JSON Schema for a value that something else than its type checks: `SamplingParams`, or a function here. They are
    read by the OpenAPI document alone, and a test holds them against what is refused."""

    keywords: dict[str, Any]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = {**handler(schema), **self.keywords}
        # of the type, which is wider
        if "maximum" in self.keywords:
            described.pop("exclusiveMaximum", None)
        return described


def ranged(minimum: float, maximum: float) -> Described:
    """Both included."""
    return Described({"minimum": minimum, "maximum": maximum})


TokenId = Annotated[Int64, Described({"minimum": 0})]
# As many choices as one request may ask for.
Choices = Annotated[Int32, ranged(1, 128)]
Logprobs = Annotated[Int32, ranged(0, MAX_LOGPROBS)]
Penalty = Annotated[float, ranged(-2, 2)]
RepetitionPenalty = Annotated[float, ranged(0.01, 100)]
Temperature = Annotated[float, ranged(0, 2)]
Share = Annotated[float, Described({"exclusiveMinimum": 0, "maximum": 1})]
# -1 is how other servers write "off".
TopK = Annotated[Int32, Described({"minimum": -1})]
MinP = Annotated[float, ranged(0, 1)]


@dataclass(frozen=True, eq=False, slots=True)
class _Only:
    neutral: tuple[object, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.neutral)}

    def _check(self, value: object) -> object:
        # `True == 1` in Python, but not in JSON.
        if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in self.neutral):
            return value
        raise PydanticCustomError("unsupported_parameter", "This value is not supported yet; leave the field out")


def only(*neutral: object) -> _Only:
    """Marks a field that is known but not supported yet: only the `neutral` values, which ask for nothing, pass."""
    return _Only(neutral)


def invalid(message: str) -> PydanticCustomError:
    """A validation error with our own sentence."""
    # The message is passed as context because pydantic formats braces in a template.
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def _as_stop_list(value: object) -> object:
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    if not (isinstance(value, list) and all(isinstance(item, str) and item for item in value)):
        raise invalid("Input should be a non-empty string or a list of non-empty strings")
    if len(value) > MAX_STOP_STRINGS:
        raise invalid(f"At most {MAX_STOP_STRINGS} stop strings are allowed")
    if any(len(item) > MAX_STOP_CHARS for item in value):
        raise invalid(f"A stop string may have at most {MAX_STOP_CHARS} characters")
    return value


_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA = {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}, {"type": "null"}]}
StopStrings = Annotated[list[str], BeforeValidator(_as_stop_list), WithJsonSchema(_STOP_SCHEMA)]


def _as_logit_bias(value: object) -> object:
    """Token ids are strings, as keys of JSON objects are. Whether the model has them is checked where it is known."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("Input should be an object from token ids to numbers")
    if len(value) > MAX_BIASES:
        raise invalid(f"At most {MAX_BIASES} tokens may have a bias")
    biases = {}
    for key, bias in value.items():
        # as JSON writes a number, so that no two keys are one id
        is_number = key.isascii() and key.isdecimal() and (key == "0" or key[0] != "0")
        if not is_number:
            raise invalid(f"Keys should be token ids such as '42', not {key[:20]!r}")
        if len(key) > _MAX_ID_DIGITS:
            raise invalid("A key is larger than any token id")
        # NaN fails the comparison, and integers of any length can be compared
        if isinstance(bias, bool) or not (isinstance(bias, int | float) and -100 <= bias <= 100):
            raise invalid(f"The bias of token {key} should be a number between -100 and 100")
        biases[int(key)] = float(bias)
    return biases


_BIAS_SCHEMA = {
    "type": ["object", "null"],
    "maxProperties": MAX_BIASES,
    "propertyNames": {"pattern": f"^(0|[1-9][0-9]{{0,{_MAX_ID_DIGITS - 1}}})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
LogitBias = Annotated[dict[int, float], BeforeValidator(_as_logit_bias), WithJsonSchema(_BIAS_SCHEMA)]


class Body(BaseModel):
    """A JSON object from a client."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    # Padding against traffic analysis; we never pad, which the API allows.
    include_obfuscation: bool | None = None


class Speculative(Body):
    """Our own extension: `{"enabled": false}` decodes one token per step. The tokens are the same either way.

    Unless acceptance is "typical": then drafts are kept that the model could well have said, by the paper's epsilon (0.09 unless
    given) and delta (its square root). max_nodes: of a step's tree, the root included.
    """

    enabled: bool = True
    max_nodes: NumTokens | None = None
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: Share | None = None
    delta: Share | None = None


class JsonSchemaFormat(Body):
    """strict changes nothing: the schema is always kept to. name and description are for people."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the output, as OpenAI names it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


def _check_schema(value: object) -> object:
    if not isinstance(value, dict | str | None):
        raise invalid("Input should be a JSON schema: an object, or a string that holds one")
    return value


SchemaOrText = Annotated[Any, BeforeValidator(_check_schema), WithJsonSchema({"type": ["object", "string", "null"]})]


class StructuredOutputs(Body):
    """The form of the output, as vLLM names it: one of these. grammar: in the notation of Lark or of llama.cpp (GBNF)."""

    json_schema: SchemaOrText = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationBody(Body):
    """What completions and chat completions have in common."""

    model: str
    max_tokens: NumTokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopStrings = []
    seed: Int64 | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias = {}
    response_format: ResponseFormat | None = None
    user: str | None = None

    # Extensions that other servers have too, under the same names.
    top_k: TopK | None = None
    min_p: MinP | None = None
    min_tokens: Annotated[Int32, Described({"minimum": 0})] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Int32 | None = None
    repetition_penalty: RepetitionPenalty | None = None
    structured_outputs: StructuredOutputs | None = None
    speculative: Speculative | None = None

    prompt_logprobs: Annotated[Any, only(None)] = None
    # What vllm-router adds to every request that it passes on: values that ask for nothing.
    no_stop_trim: Annotated[Any, only(None, False)] = None
    return_hidden_states: Annotated[Any, only(None, False)] = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token whose log-probabilities are asked for; None where not even the token's own is."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt."""
        return None

    @property
    def is_usage_streamed(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """Predicted tokens that are in the completions, and those that are not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct):
    """Tokens of the whole request: prompts are counted once, completions over all choices. completion_tokens_details: of requests
    with a prediction."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET


class SpeculationMetrics(msgspec.Struct, kw_only=True):
    """Steps with draft nodes, in the shape of vLLM, which load generators read.

    acceptance_histogram: steps by accepted drafts, from 0 to num_spec_tokens, the depth of the tree. mean_acceptance_length: with
    the bonus token. num_draft_tokens: depth offered, summed over steps.
    """

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    per_step_accepted: None = None
    per_step_drafted: None = None


class RequestMetrics(msgspec.Struct, kw_only=True):
    """Of a request of one choice, as the front end saw it. generation_time_ms: from the first token to the last. tokens_per_second:
    from arrival to the last. speculative_decoding: null where no step had draft nodes."""

    time_to_first_token_ms: float
    generation_time_ms: float
    queue_time_ms: float
    mean_itl_ms: float | None
    tokens_per_second: float | None
    speculative_decoding: SpeculationMetrics | None


# null for a request of several choices; absent in chunks but the one that carries usage
OptionalMetrics = RequestMetrics | None | msgspec.UnsetType
# only where they were asked for
OptionalIds = list[int] | msgspec.UnsetType
# A key that is absent differs from one that is null: streams carry `usage: null` only when usage was asked for.
OptionalUsage = Usage | None | msgspec.UnsetType
encode: Callable[[object], bytes] = msgspec.json.Encoder().encode
