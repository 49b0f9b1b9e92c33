"""What the HTTP layer needs from the process around it: settings, a text codec and a gateway to compute with.

Nothing here knows of Ray or torch. `deployments/gateway.py` implements `GatewayContext`; the tests implement
it with a few lines; `pimoe.runtime.model.tokenizer` implements `TextCodec`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ...runtime.caching import BypassReason
from ...runtime.errors import ConfigurationError
from ...runtime.requests import GenerateAnswer, GenerateRequest, InferAnswer, InferRequest, ModelInfo
from .known_answers import KnownAnswers
from .modes import MODE_NAMES, ModeName, Modes
from .prompt_cache import ChatPrompts

MIB = 1 << 20

# A day. It keeps seconds below the smallest integer that is read as Triton's microseconds (options.py).
LONGEST_TIMEOUT_S = 86_400.0

_NO_NUMBERS = ("default_mode", "modes")


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Limits of the HTTP layer.

    Attributes:
        max_body_bytes: largest request body; more is answered with 413.
        max_json_bytes: largest JSON part of a body. Parsing JSON blocks the event loop and takes a multiple
            of its size in memory, so large tensors have to come in binary.
        default_timeout_s: time for a request that names none; also bounds how long a body may take to arrive.
        max_timeout_s: largest time a request may ask for.
        deadline_grace_s: how much later than the request's deadline the gateway itself gives up, so that the
            backend's own, better explained, error wins when the backend is alive.
        max_choices: largest `n`.
        max_prompts: most prompts in one completion request.
        max_infer_many: most operations in one `infer_many` call.
        max_stop_strings: most `stop` strings, of at most `max_stop_chars` characters each.
        max_logprobs: most alternatives per token.
        default_completion_tokens: `max_tokens` of `/v1/completions` when none is given (OpenAI's 16).
        default_chat_tokens: the same for `/v1/chat/completions`; both are lowered to what the context has
            left.
        default_mode: the mode of requests that name none; None: such requests have none.
        modes: the presets, see `modes.py`.

    Raises:
        ConfigurationError: a value is not positive, or the timeouts contradict each other.
    """

    max_body_bytes: int = 64 * MIB
    max_json_bytes: int = 16 * MIB
    default_timeout_s: float = 60.0
    max_timeout_s: float = 3600.0
    deadline_grace_s: float = 0.25
    max_choices: int = 8
    max_prompts: int = 128
    max_infer_many: int = 256
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = 20
    default_completion_tokens: int = 16
    default_chat_tokens: int = 16_384
    default_mode: ModeName | None = None
    modes: Modes = field(default_factory=Modes)

    def __post_init__(self) -> None:
        if self.default_mode is not None and self.default_mode not in MODE_NAMES:
            right = f"it must be one of {', '.join(MODE_NAMES)}, or left out"
            raise ConfigurationError(f"default_mode is {self.default_mode!r}; {right}", "default_mode")
        for item in fields(self):
            if item.name in _NO_NUMBERS:
                continue
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigurationError(f"{item.name} is {value!r}; it must be a number above 0", item.name)
        if not self.default_timeout_s <= self.max_timeout_s <= LONGEST_TIMEOUT_S:
            raise ConfigurationError(
                f"default_timeout_s ({self.default_timeout_s}) <= max_timeout_s ({self.max_timeout_s}) <= "
                f"{LONGEST_TIMEOUT_S} does not hold",
                "max_timeout_s",
            )


class IncrementalText(Protocol):
    """Decodes one sequence token by token, holding back bytes that are no whole character yet."""

    def push(self, token_ids: list[int], /) -> str:
        """The text that these tokens complete; may be empty."""
        ...

    def finish(self) -> str:
        """What is still held back, with U+FFFD for bytes that never became a character."""
        ...


class TextCodec(Protocol):
    """A tokenizer and its chat template. `encode` of long texts is called from a thread and must be safe there."""

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that give no text."""
        ...

    @property
    def chat_template(self) -> str:
        """The text of the chat template; empty where there is none."""
        ...

    @property
    def chat_variables(self) -> frozenset[str]:
        """The variables that the chat template reads."""
        ...

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, token_ids: list[int], /, skip_special_tokens: bool = True) -> str:
        """Token ids to text; special tokens give no text, or their names."""
        ...

    def token_text(self, token_id: int, /) -> str:
        """One token as text, U+FFFD where it is no whole character."""
        ...

    def token_piece(self, token_id: int, /) -> str:
        """One token as the vocabulary spells it."""
        ...

    def added_token_id(self, piece: str, /) -> int | None:
        """The token added to the vocabulary under that name; None where there is none."""
        ...

    def incremental(self, context: list[int], /) -> IncrementalText:
        """A decoder for one new sequence. With the tokens before it as `context`, which give no text, its
        first token keeps a space that decoding would strip from the beginning of a text."""
        ...

    def render_chat(self, messages: list[dict[str, Any]], /, variables: Mapping[str, Any] | None = None) -> str:
        """The prompt that the model's chat template makes of messages, and of more variables such as `tools`.

        Raises:
            InvalidRequestError: there is no template, or it refuses these messages.
        """
        ...

    def render_unfinished_chat(
        self, messages: list[dict[str, Any]], /, variables: Mapping[str, Any] | None = None
    ) -> str:
        """The same up to the end of the last message, for the model to go on with it.

        Raises:
            InvalidRequestError: as `render_chat`, or the end is not to be seen.
        """
        ...


class GatewayContext(Protocol):
    """Everything behind the routes."""

    @property
    def settings(self) -> ApiSettings:
        """Limits; constant."""
        ...

    @property
    def model(self) -> ModelInfo:
        """The model served.

        Raises:
            UnavailableError: no router has described it yet.
        """
        ...

    @property
    def created_s(self) -> int:
        """Unix time at which this application started; `created` of `/v1/models`."""
        ...

    @property
    def tokenizer(self) -> TextCodec | None:
        """None for a checkpoint without a tokenizer: prompts then come as token ids."""
        ...

    @property
    def prompts(self) -> ChatPrompts | None:
        """The chats of `tokenizer` as token ids, remembered; None where there is no tokenizer."""
        ...

    async def infer(self, request: InferRequest, bypass: BypassReason | None) -> InferAnswer:
        """Answers tensor work, from the cache or from a router; cancelling it cancels the work.

        Args:
            bypass: why the cache is to leave it alone; None: it may answer.
        """
        ...

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None) -> GenerateAnswer:
        """Starts a generation. Closing `chunks` (`aclose`) cancels it, before its first item too."""
        ...

    @property
    def known(self) -> KnownAnswers | None:
        """Answers that were sent before; None: none are kept."""
        ...

    def recall(self, hits: Sequence[object]) -> bool:
        """Whether the cache would give these (`hit` of earlier answers) again; then it has, and counted them."""
        ...

    async def ready(self) -> bool:
        """Whether every expert group and a router have a live replica."""
        ...

    async def status(self) -> dict[str, Any]:
        """The page of `/admin/status`, as plain values."""
        ...

    async def flush_cache(self, model: str | None, tenant: str | None) -> dict[str, Any]:
        """Forgets answers of a model, of a tenant, or of both (None: of any), in every gateway and in the second
        level.

        Returns:
            The body of `/admin/cache/flush`: `flushed`, `gateways`, `second_level`.

        Raises:
            UnavailableError: some part was not reached, and may hold answers still.
        """
        ...

    async def metrics(self) -> tuple[bytes, str]:
        """The page of `/metrics` and its content type."""
        ...
