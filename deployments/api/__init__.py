"""The HTTP API: OpenAI's routes, the Open Inference Protocol's, and the operators' own, as one Starlette
application.

    app = create_app(context)     # context: what computes, see GatewayContext

Files, in the order a request meets them: `app` (paths) -> `call` (one request: id, lifetime, errors) ->
`bodies`, `fields`, `options` (untrusted input) -> `openai`, `inference`, `admin` (handlers) -> `openai_params` and
what it names, `modes`, `chat_prompt` (what is wanted) -> `generation`, `assembly` (tokens to text) ->
`tool_formats` (text to tool calls) -> `openai_answer`, `openai_format`, `inference_codec`, `wire` (answers). Every
error goes through the table in `errors`.
"""

from .app import create_app
from .context import ApiSettings, GatewayContext, IncrementalText, TextCodec

__all__ = ["ApiSettings", "GatewayContext", "IncrementalText", "TextCodec", "create_app"]
