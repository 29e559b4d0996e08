"""What clients may send, as OpenAI's interface has it. A field that nobody knows is an error that names the nearest
one; a known field that this server cannot honour is refused, unless ignoring it changes no answer.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_CHOICES = 8
MOST_PROMPTS = 16
MOST_TOOLS = 64
Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=2**23)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Lenient(BaseModel):
    """Unknown fields are let pass: parts of a conversation that other servers wrote."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Lenient):
    type: Literal["text"]
    text: Text


class FileName(Strict):
    file_id: Annotated[str, Field(max_length=64)]
    filename: Annotated[str | None, Field(max_length=1024)] = None


class FilePart(Lenient):
    """A document of /v1/files."""

    type: Literal["file"]
    file: FileName


class FunctionCall(Lenient):
    name: Annotated[str, Field(max_length=128)]
    arguments: Text


class ToolCall(Lenient):
    id: Annotated[str, Field(max_length=128)] = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool", "exec"]
    content: Text | list[Annotated[TextPart | FilePart, Field(discriminator="type")]] | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=MOST_TOOLS)] = None
    tool_call_id: Annotated[str | None, Field(max_length=128)] = None
    name: Annotated[str | None, Field(max_length=128)] = None

    @model_validator(mode="after")
    def _whole(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if self.role != "user" and any(isinstance(part, FilePart) for part in self.parts()):
            raise ValueError("a document stands in a user's message")
        return self

    def parts(self) -> list[TextPart | FilePart]:
        if isinstance(self.content, list):
            return self.content
        return [TextPart(type="text", text=self.content)] if self.content else []

    def text(self) -> str:
        """The text parts as one text."""
        return "\n".join(part.text for part in self.parts() if isinstance(part, TextPart))

    def files(self) -> list[str]:
        return [part.file.file_id for part in self.parts() if isinstance(part, FilePart)]


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str | None, Field(max_length=20_000)] = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Annotated[str, Field(max_length=64)]


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Strict):
    name: Annotated[str, Field(max_length=64)]
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and that type needs it")
        return self


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Drawing(Strict):
    """What both kinds of completion share. top_k, min_p, repetition_penalty and return_progress are not OpenAI's."""

    model: Annotated[str, Field(max_length=512)]
    max_tokens: Annotated[int | None, Field(ge=1, le=2**53)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, allow_inf_nan=False)] = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10, allow_inf_nan=False)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: Annotated[bool, Field(description="In a stream: chunks with prompt_progress while reading.")] = (
        False
    )
    user: Annotated[str | None, Field(max_length=512, description="Clients take turns; this tells them apart.")] = None

    # Known to OpenAI's interface; without effect on an answer here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # Known, and refused where they would ask for something.
    logit_bias: Annotated[dict[str, Finite] | None, Field(max_length=0, description="Not supported.")] = None

    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Drawing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=2**53)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=MOST_TOOLS)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    cite: Annotated[
        Literal["auto", "attention", "numbers", "off"] | None,
        Field(description="How an answer about documents is tied to them; auto where it is left out."),
    ] = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names a function that is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice needs tools")
        if self.json_mode and names and self.tool_choice != "none":
            raise ValueError(f"response_format {self.response_format.type} and tools exclude each other")  # type: ignore[union-attr]
        return self

    @property
    def json_mode(self) -> bool:
        """Whether the answer must be JSON, of a schema or any object."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema that the answer must fit."""
        named = self.response_format.json_schema if self.response_format is not None else None
        return named.schema_ if named is not None else None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Drawing):
    prompt: Text | list[int] | list[Text] | list[list[int]]
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    echo: bool | None = None
    best_of: Annotated[int | None, Field(ge=1, le=1, description="Only 1.")] = None
    suffix: Annotated[str | None, Field(max_length=0, description="Not supported.")] = None

    @field_validator("prompt")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if isinstance(value, list):
            if not value:
                raise ValueError("the prompt is empty")
            if not isinstance(value[0], int) and len(value) > MOST_PROMPTS:
                raise ValueError(f"at most {MOST_PROMPTS} prompts are taken at once")
        return value

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
