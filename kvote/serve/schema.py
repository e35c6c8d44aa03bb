"""The schema of requests. Every standard field works, changes nothing by its nature, or is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Fields of OpenAI's interface that this server does not honour, and the values that ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": (),
    "best_of": (1,),
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": (),
    "truncation": ("disabled",),
    "text": ({"format": {"type": "text"}},),
}
Text = Annotated[str, Field(max_length=64_000_000)]
Token = Annotated[int, Field(ge=0, le=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sampled(_Strict):
    """The fields that all ways of asking have in common. ``temperature`` and ``top_p`` left out: the model's own.
    ``kv_read``: tell what the answer has read, as shares of its queries over the text."""

    model: str = Field(max_length=500)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool = False
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    kv_method: str | None = Field(None, max_length=2_000)
    document: str | None = Field(None, max_length=200)
    kv_read: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuses_by_name(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        left = dict(given)
        for name, harmless in _NOTHING.items():
            if name in left and name not in cls.model_fields:
                value = left.pop(name)
                if value is not None and value not in harmless:
                    raise ValueError(f"{name} is not supported by this server; leave it out")
        return left


class StreamOptions(_Strict):
    """What a stream tells besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Decoded(Sampled):
    """Chat and text completions. The two penalties and ``logit_bias`` are as in OpenAI's documentation."""

    n: int = Field(1, ge=1, le=16)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    presence_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream_options: StreamOptions | None = None

    @field_validator("n", "frequency_penalty", "presence_penalty", "stream", mode="before", check_fields=False)
    @classmethod
    def _null_is_left_out(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _few_and_not_empty(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or any(not text or len(text) > 500 for text in stops):
            raise ValueError("at most 4 texts of 1 to 500 characters")
        return stops

    @model_validator(mode="after")
    def _options_only_with_a_stream(self) -> "Decoded":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self


class Part(_Strict):
    """A part of a message; only text is read."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Call(_Strict):
    """A tool call of an earlier turn."""

    class Function(_Strict):
        """Its name, and arguments as JSON."""

        name: str = Field(max_length=200)
        arguments: str

    id: str = Field(max_length=200)
    type: Literal["function"] = "function"
    function: Function


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Tool(_Strict):
    """A tool that the template tells the model of."""

    class Function(BaseModel):
        """Its name, what it does, and a JSON schema of its parameters."""

        name: str = Field(max_length=200)
        description: str | None = None
        parameters: dict[str, Any] | None = None

    type: Literal["function"]
    function: Function


class ResponseFormat(_Strict):
    """Plain text is all that is promised."""

    type: Literal["text"]


class ChatRequest(Decoded):
    """A chat completion."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = None

    @model_validator(mode="after")
    def _top_logprobs_only_with_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class CompletionRequest(Decoded):
    """A text completion."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    logprobs: int | None = Field(None, ge=0, le=5)


class ResponsesRequest(Sampled):
    """A response."""

    input: Text | list[Message]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["auto", "none"] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    stream_options: StreamOptions | None = None


class DocumentRequest(_Strict):
    """A text to read once."""

    text: Text = Field(min_length=1)
    name: str | None = Field(None, max_length=200)
    kv_method: str | None = Field(None, max_length=2_000)
    system: Text | None = None
