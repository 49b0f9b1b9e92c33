"""The `pimoe` command. Thin: each command gathers its settings and calls the module that does the work."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import pydantic
    import typer
    import yaml
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as missing:  # the light client is installed without the server's packages
    sys.exit(f"the pimoe command needs the server: pip install 'pimoe[server]' ({missing})")

from ..clients import AsyncClient, Client, GenerateOptions, Mode, PimoeClientError
from ..runtime.embedded import CHECKPOINT
from ..runtime.embedded.evaluate import MAX_ANSWER_TOKENS, Answer, SkillScore, evaluate
from ..runtime.errors import ConfigurationError, PimoeError
from ..runtime.requests import GenerateRequest, SamplingParams
from .cache_commands import cache_cli
from .local_settings import local_settings
from .processes import supervise
from .settings import AppSettings

if TYPE_CHECKING:
    from .cluster import LocalCluster

cli = typer.Typer(
    help="Serve Mixture-of-Experts models whose expert groups live apart, on Ray Serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

cli.add_typer(cache_cli, name="cache")

DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_TOKENS = 128

ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder of a checkpoint; the embedded model when left out.")
]
GroupsOption = Annotated[int, typer.Option(min=1, help="Expert groups.")]
ReplicasOption = Annotated[int, typer.Option(min=1, help="Replicas of each expert group.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own when left out.")
]


def _checked_url(url: str | None) -> str | None:
    if url is not None and not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url!r} is not like {DEFAULT_URL}")
    return url


ModeOption = Annotated[
    Mode | None, typer.Option(help="A preset of the server; what is given besides wins over it.")
]
UrlOption = Annotated[str, typer.Option(help="Where the application answers.", callback=_checked_url)]


def main() -> NoReturn:
    """Entry point: errors that we know come out as one line and exit code 1, never as a traceback."""
    sys.exit(_guarded(lambda: cli(standalone_mode=False)))


def _guarded(work: Callable[[], object]) -> int:
    """Run `work`; the exit code that it, or its error, stands for."""
    try:
        code = work()
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except pydantic.ValidationError as error:
        return _complain("invalid_configuration", _explain(error))
    except (PimoeError, PimoeClientError) as error:
        return _complain(error.code, error.message)
    except Exception as error:
        # click's usage errors know how to show themselves; anything else is ours to mend, and keeps its traceback.
        if not hasattr(error, "show"):
            raise
        error.show()
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def _complain(code: str, text: str) -> int:
    Console(stderr=True).print(f"[red]error[/] {escape(f'[{code}] {text}')}", highlight=False, soft_wrap=True)
    return 1


def _explain(error: pydantic.ValidationError) -> str:
    parts = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return "; ".join(parts)


def _settings(
    model: str | None,
    groups: int,
    replicas: int,
    dtype: str | None = None,
    name: str | None = None,
    config: Path | None = None,
) -> AppSettings:
    overrides = _read_config(config)
    overrides |= {key: value for key, value in (("dtype", dtype), ("name", name)) if value is not None}
    if model is not None:
        overrides["model"] = str(Path(model).expanduser().resolve())
    return local_settings(None, groups, replicas, overrides)


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: {error}", "config") from error
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{path} is no map of settings", "config")
    if "applications" in fields:
        raise ConfigurationError(f"{path} is a Serve config: deploy it with `serve deploy {path}`", "config")
    return fields


def _check_model(settings: AppSettings) -> None:
    """Open the checkpoint before Ray starts: a mistake shows at once, and whole."""
    from .plan import check_checkpoint

    check_checkpoint(settings)


@cli.command()
def serve(
    model: ModelArgument = None,
    groups: GroupsOption = 2,
    replicas: ReplicasOption = 1,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    dtype: DtypeOption = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of application settings.")] = None,
) -> None:
    """Serve a model on this machine until Ctrl-C."""
    settings = _settings(model, groups, replicas, dtype, name, config)
    _check_model(settings)

    def work(cluster: LocalCluster) -> None:
        cluster.start(settings, _progress)
        console.print(
            f"[bold]{settings.served_name}[/] is served at {cluster.url}; Ctrl-C stops it", highlight=False
        )
        while True:
            signal.pause()

    _with_cluster(host, port, work)


@cli.command()
def demo(port: PortOption = 8000, groups: GroupsOption = 2) -> None:
    """Start the embedded model, show what runs where, ask it, and stop."""
    from .demo import run_demo

    settings = local_settings(None, groups)
    _with_cluster("127.0.0.1", port, lambda cluster: run_demo(cluster, settings, console))


def _with_cluster(host: str, port: int, work: Callable[[LocalCluster], None]) -> NoReturn:
    """Do `work` with a cluster of this command's own, of which nothing survives the command."""

    def owned() -> None:
        from .cluster import owned_cluster

        with owned_cluster(host, port, _progress) as cluster:
            work(cluster)

    raise typer.Exit(supervise(lambda: _guarded(owned)))


def _progress(step: str) -> None:
    console.print(f"[dim]{step} ...[/]")


@cli.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    url: UrlOption = DEFAULT_URL,
    mode: ModeOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as the user's message of a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system's message before it.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"{_MAX_TOKENS} when left out, or the mode's own.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 for all tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal ones give equal answers.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    cache: Annotated[bool, typer.Option(help="Whether the result cache may answer.")] = True,
) -> None:
    """Continue a prompt and show the tokens as they come."""
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat")
    text = sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n")
    before = [] if system is None else [{"role": "system", "content": system}]
    options: GenerateOptions = {
        "mode": mode,
        "max_tokens": max_tokens or (_MAX_TOKENS if mode in (None, "none") else None),
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
        "cache": None if cache else False,
    }
    with Client(url) as client:
        for chunk in client.stream([*before, {"role": "user", "content": text}] if chat else text, **options):
            print(chunk.text, end="", flush=True)
    print()


@cli.command()
def plan(
    model: ModelArgument = None,
    groups: GroupsOption = 2,
    replicas: ReplicasOption = 1,
    dtype: DtypeOption = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of application settings.")] = None,
) -> None:
    """Show what would run where, with memory. Starts nothing."""
    from .plan import plan_table

    console.print(plan_table(_settings(model, groups, replicas, dtype, None, config)))


@cli.command()
def build(
    model: ModelArgument = None,
    groups: GroupsOption = 2,
    replicas: ReplicasOption = 1,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    dtype: DtypeOption = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
) -> None:
    """Print a Serve config for `serve deploy`."""
    from .plan import serve_config

    settings = _settings(model, groups, replicas, dtype, name)
    _check_model(settings)
    print(yaml.safe_dump(serve_config(settings, host, port), sort_keys=False), end="")


@cli.command()
def status(
    url: UrlOption = DEFAULT_URL,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show what runs where, what waits and what the cache did in a running application."""
    from .status_view import show_status, watch_status

    with Client(url) as client:
        if watch:
            watch_status(client, console, interval)
        show_status(client, console)


@cli.command(name="evaluate")
def evaluate_command(
    served: Annotated[bool, typer.Option("--served", help="Start the application and ask it.")] = False,
    url: Annotated[
        str | None, typer.Option(help="Ask an application that runs already.", callback=_checked_url)
    ] = None,
    groups: GroupsOption = 2,
    samples: Annotated[int, typer.Option(min=1, help="Held-out prompts per skill.")] = 100,
    port: PortOption = 8000,
) -> None:
    """Exact answers per skill of the embedded model: in-process, or through the served application."""
    if url is not None:
        _show_scores(asyncio.run(_evaluate_url(url, samples)), f"through {url}")
    elif not served:
        _show_scores(asyncio.run(_evaluate_in_process(groups, samples)), "in-process")
    else:

        def work(cluster: LocalCluster) -> None:
            cluster.start(local_settings(None, groups), _progress)
            scores = asyncio.run(_evaluate_url(cluster.url, samples))
            _show_scores(scores, "through the served application")

        _with_cluster("127.0.0.1", port, work)


async def _evaluate_url(url: str, samples: int) -> list[SkillScore]:
    async with AsyncClient(url) as client:

        async def answer(prompt: str) -> str:
            generation = await client.generate(prompt, max_tokens=MAX_ANSWER_TOKENS, temperature=0, cache=False)
            return generation.text

        return await evaluate(answer, samples)


async def _evaluate_in_process(groups: int, samples: int) -> list[SkillScore]:
    from ..runtime.local import LocalRuntime
    from ..runtime.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(CHECKPOINT)
    assert tokenizer is not None
    async with await LocalRuntime.start(CHECKPOINT, groups) as runtime:
        return await evaluate(in_process_answer(runtime, tokenizer), samples)


def in_process_answer(runtime: Any, tokenizer: Any) -> Answer:
    """Greedy completions from a `LocalRuntime`."""

    async def answer(prompt: str) -> str:
        sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0)
        request = GenerateRequest("evaluate", tuple(tokenizer.encode(prompt)), sampling)
        tokens = [token async for chunk in runtime.router.generate(request) for token in chunk.token_ids]
        return str(tokenizer.decode(tokens))

    return answer


def _show_scores(scores: list[SkillScore], where: str) -> None:
    table = Table(title=f"embedded model, exact answers {where}", title_justify="left")
    for column in ("skill", "exact", "prompts", "accuracy"):
        table.add_column(column, justify="left" if column == "skill" else "right")
    for score in scores:
        table.add_row(score.skill, str(score.exact), str(score.total), f"{score.accuracy:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
