"""`pimoe status` in 80 columns, from pages made by hand; `--watch` with a client that follows a script."""

from __future__ import annotations

import io
from typing import Any

import pytest
import status_pages as pages
from pimoe.clients import Client, PimoeClientError
from pimoe.clients.errors import ConnectionFailed
from pimoe.deployments.status_view import rates_line, short, show_status, status_view, watch_status
from rich.console import Console

BIG = 123_456_789_012
HUGE: dict[str, Any] = {
    **dict.fromkeys(("items", "tokens", "refused", "shed", "expired", "cancelled"), BIG),
    "waits": [0.2] * 9 + [100.0],
}


def shown(status: dict[str, Any], rates: str = "") -> str:
    """What is printed on a terminal of 80 columns."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(status_view(status, rates))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, text
    return text


def row(text: str, label: str) -> list[str]:
    """The cells of the only row that begins with a label."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label + " ")]
    return line.split()


def test_the_largest_numbers_fit_in_80_columns() -> None:
    queue = pages.queue(**dict.fromkeys(("batch", "low", "default", "high", "interactive"), HUGE))
    reasons = dict.fromkeys(("full", "next_does_not_fit", "max_wait", "slack", "idle", "drain"), BIG)
    batcher = pages.batcher(queue, (1, 70_000), closed=reasons, batches=BIG, tokens=BIG**2, in_flight=2)
    engine = pages.engine(queue, steps=BIG, prefill_tokens=BIG, decode_tokens=BIG, kv_bytes=BIG, running=9999)
    text = shown(pages.page([pages.router("w" * 12, batcher=batcher, engine=engine)]), "per second: 1 requests")
    rows = [line.split() for line in text.splitlines() if line.startswith("  interactive ")]
    assert rows == [["interactive", "123G", "123G", "<250", "ms", ">60", "s", *["123G"] * 4]] * 2
    for part in (
        f"next_does_not_fit {BIG:,}",
        f"{BIG:,} prompt tokens",
        "9,999 sequences",
        "115.0 GiB",
        "4194304",
    ):
        assert part in " ".join(text.split()), part


def test_what_waits_is_shown_by_class_with_the_most_urgent_first() -> None:
    tensors = pages.queue(
        batch={"items": 3, "tokens": 99_999, "refused": 7, "waits": [0.3]},
        interactive={"cancelled": 1, "waits": [0.004] * 99 + [1.5]},
    )
    text = shown(pages.page([pages.router(batcher=pages.batcher(tensors))]))
    assert row(text, "tensors") == ["tensors", "3", "99,999", "<5", "ms", "<500", "ms", "7", "0", "0", "1"]
    assert row(text, "batch") == ["batch", "3", "99,999", "<500", "ms", "<500", "ms", "7", "0", "0", "0"]
    assert row(text, "interactive") == ["interactive", "0", "0", "<5", "ms", "<5", "ms", "0", "0", "0", "1"]
    assert text.index("interactive") < text.index("batch ")
    assert "default" not in text  # nobody used it
    assert row(text, "generation") == ["generation", *["0"] * 6]


def test_a_quiet_application_is_shown_without_noise() -> None:
    text = shown(pages.page([pages.router()]))
    assert "closed by" not in text
    assert "generation:" not in text
    assert "requests: none yet" in text
    assert "second level" not in text


def test_routers_are_added_up() -> None:
    queue = {"default": {"items": 2, "tokens": 20, "waits": [0.02]}}
    routers = [
        pages.router(
            name,
            batcher=pages.batcher(
                pages.queue(default=dict(queue["default"])),
                (10,) * 4,
                closed={reason: 4},
                utilisation=busy,
                latency={"trusted": trusted, "error_ratio": error},
            ),
        )
        for name, reason, busy, trusted, error in (("a", "idle", 0.2, True, 0.1), ("b", "full", 0.4, False, 0.9))
    ]
    text = shown(pages.page(routers))
    assert row(text, "default")[1:3] == ["4", "40"]
    assert "batches: 8 of 10 tokens, 0 in flight, busy 30%" in text
    assert "closed by idle 4, full 4; latency model off by 10%" in text  # one that is not trusted says nothing


def test_a_layer_model_has_no_generation() -> None:
    text = shown(pages.page([pages.router(engine=None)]))
    assert "tensors" in text
    assert "generation" not in text


def test_without_routers_the_rest_is_shown_still() -> None:
    text = shown(pages.page([]))
    assert "no router answers yet" in text
    assert "router     │           │         │ none" in text
    for part in ("e5f6a7b8", "group-0", "experts 2 3"):
        assert part in text


def test_refused_settings_are_shown() -> None:
    status = pages.page([pages.router()])
    assert "old settings" not in shown(status)
    status["routers"][0]["refused_settings"] = "queue.max_items is 0; it must be above 0"
    status["groups"][1]["replicas"][0]["refused_settings"] = None
    assert "a1b2c3d4 keeps its old settings: queue.max_items is 0; it must be above 0" in shown(status)


def test_a_group_without_replicas_is_not_left_out() -> None:
    status = pages.page([pages.router()])
    status["groups"][1]["replicas"] = []
    (line,) = [line for line in shown(status).splitlines() if "group-1" in line]
    assert "none" in line


def test_an_unknown_state_is_shown() -> None:
    text = shown(pages.page([pages.router(), pages.router("dead0000", state="unknown")]))
    (line,) = [line for line in text.splitlines() if "dead0000" in line]
    assert "unknown" in line
    (line,) = [line for line in text.splitlines() if "a1b2c3d4" in line]
    assert "running" in line


@pytest.mark.parametrize(
    ("experts", "words"),
    [(list(range(128)), "experts 0 to 127"), ([3], "experts 3"), ([4, 0, 2], "experts 0 2 4"), ([], "experts")],
)
def test_experts_are_named_briefly(experts: list[int], words: str) -> None:
    status = pages.page([pages.router()])
    status["groups"][0]["experts"] = experts
    (line,) = [line for line in shown(status).splitlines() if "group-0 " in line]
    assert f"│ {words} " in line


def test_a_list_of_many_experts_is_whole() -> None:
    status = pages.page([pages.router("replica-of-twenty-ch")])
    status["groups"][0]["experts"] = list(range(1, 129, 2))
    text = shown(status)
    held = " ".join(line.split("│")[5] for line in text.splitlines() if line.count("│") == 7)
    assert [int(word) for word in held.split() if word.isdigit()] == [*range(1, 129, 2), 2, 3]


@pytest.mark.parametrize("second", [False, True])
def test_the_cache(second: bool) -> None:
    gateways = [pages.gateway(name, second) for name in "ab"]
    for gateway in gateways:
        gateway["cache"]["outcomes"].update(memory=1000, miss=3)
        gateway["cache"].update(entries=2, bytes=2**20)
        if second:
            gateway["cache"]["second"].update(hits=5, written=6)
            gateway["cache"]["second"]["misses"].update(timeout=7, absent=8)
            gateway["cache"]["second"]["dropped"]["full"] = 9
    text = shown(pages.page([pages.router()], gateways))
    assert "cache: 4 entries, 2.0 MiB of 512.0 MiB; requests: memory 2,000, miss 6" in text
    assert ("second level: hits 10, misses 30, written 12, dropped 18" in text) is second
    assert "breaker" not in text
    if second:
        gateways[0]["cache"]["second"]["breaker_open"] = 1
        assert "; breaker open" in shown(pages.page([pages.router()], gateways))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (99_999, "99,999"),
        (100_000, "100k"),
        (123_456, "123k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (1_234_567, "1.23M"),
        (12_345_678, "12.3M"),
        (999_999_999, "1G"),
        (1.5e12, "1.5T"),
    ],
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


# Rates -----------------------------------------------------------------------------------------------------------


def looked(router: str, tokens: int, requests: int = 0, gateway: str = "g") -> dict[str, Any]:
    routes = (("/v1/completions", 200, requests), ("/admin/status", 200, 99 + tokens), ("/metrics", 200, tokens))
    engine = pages.engine(prefill_tokens=2 * tokens, decode_tokens=3 * tokens)
    routers = [pages.router(router, batcher=pages.batcher(tokens=tokens), engine=engine)] if router else []
    return pages.page(routers, [pages.gateway(gateway, requests=routes)])


def test_rates_are_per_second_and_without_our_own_looks() -> None:
    line = rates_line(looked("a", 10, 1), looked("a", 30, 6), 2.0)
    assert line == ("per second: 2.5 requests; tokens: 10.0 tensor, 20.0 prompt, 30.0 generated")


def test_a_new_replica_counts_from_zero_and_takes_nothing_from_the_rates() -> None:
    line = rates_line(looked("a", 1_000_000, 500), looked("b", 30, 4, "h"), 1.0)
    assert "4.0 requests; tokens: 30.0 tensor" in line


def test_a_replica_that_goes_or_is_shown_older_counts_nothing() -> None:
    assert "0.0 requests; tokens: 0.0 tensor" in rates_line(looked("a", 50, 5), looked("", 40, 5), 1.0)
    assert "0.0 requests; tokens: 0.0 tensor" in rates_line(looked("a", 50, 5), looked("a", 40, 4), 1.0)


def test_no_time_no_rates() -> None:
    assert rates_line(looked("a", 1), looked("a", 2), 0.0) == ""


# The live view ---------------------------------------------------------------------------------------------------


class ScriptedClient(Client):
    """Gives these pages, or raises these errors, one after the other; then it is interrupted, as by Ctrl-C."""

    def __init__(self, *looks: dict[str, Any] | Exception) -> None:
        super().__init__("http://127.0.0.1:1")
        self.looks = list(looks)

    def status(self) -> dict[str, Any]:
        if not self.looks:
            raise KeyboardInterrupt
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look


class Screen(io.StringIO):
    """A terminal; `frames` has what was drawn between two waits."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[str] = []
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.frames.append(self.getvalue())
        self.seek(0)
        self.truncate()
        self.now += seconds

    def clock(self) -> float:
        return self.now


def watch(*looks: dict[str, Any] | Exception, interval_s: float = 2.0) -> list[str]:
    screen = Screen()
    console = Console(file=screen, width=80, height=40, force_terminal=True, color_system=None)
    with ScriptedClient(*looks) as client, pytest.raises(KeyboardInterrupt):
        watch_status(client, console, interval_s, screen.clock, screen.sleep)
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back
    return screen.frames


def test_watching_goes_on_when_the_application_goes_away_and_comes_back() -> None:
    gone = ConnectionFailed("nobody answers: is `pimoe serve` running?")
    frames = watch(looked("a", 10), gone, PimoeClientError("?"), looked("", 0), looked("b", 70), interval_s=2.0)
    assert len(frames) == 5
    assert "tensors" in frames[0]
    assert "per second" not in frames[0]
    assert f"[{gone.code}] nobody answers" in frames[1]
    assert "tensors" not in frames[1]
    assert "no router answers yet" in frames[3]
    assert "35.0 tensor" in frames[4]


def test_rates_are_over_the_time_since_the_last_page_not_the_last_look() -> None:
    gone = ConnectionFailed("away")
    frames = watch(looked("a", 10), gone, gone, gone, looked("a", 90), interval_s=2.0)
    assert "10.0 tensor" in frames[4]


def test_an_interrupt_while_waiting_ends_it() -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80)
    with ScriptedClient(looked("a", 1)) as client, pytest.raises(KeyboardInterrupt):
        watch_status(client, console, 1.0, sleep=interrupt)


def test_shown_once() -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    with ScriptedClient(looked("a", 1)) as client:
        show_status(client, console)
    assert "what runs where" in console.export_text()
