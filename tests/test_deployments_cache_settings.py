"""The cache's settings: what they become, and that no secret is ever shown."""

from __future__ import annotations

import builtins
from typing import Any

import pydantic
import pytest
from pimoe.deployments.settings import AppSettings, CacheSettings
from pimoe.runtime.caching import CacheLimits, PrefetchLimits, RedisLimits
from pimoe.runtime.errors import ConfigurationError

URL = "redis://user:hunter2@cache.example:6380/1"
KEY = "0f" * 32


def cache(**fields: Any) -> CacheSettings:
    return AppSettings.model_validate({"gateway": {"cache": fields}}).gateway.cache


def test_defaults_are_the_runtimes() -> None:
    assert cache().to_limits() == CacheLimits()
    assert cache().to_second_level() is None
    assert not cache().share_tenants
    assert cache(second_level={"url": URL}).to_second_level() == RedisLimits(URL)


def test_values_arrive() -> None:
    settings = cache(policy="sieve", min_bytes=10, max_bytes=1000, share_tenants=True)
    assert settings.to_limits() == CacheLimits(max_bytes=1000, policy="sieve", min_bytes=10)
    assert settings.share_tenants
    prefetch = cache(prefetch={"enabled": True, "max_per_minute": 5, "horizon_s": 2}).to_prefetch()
    assert prefetch == PrefetchLimits(enabled=True, max_per_minute=5, horizon_s=2)
    assert type(prefetch.max_per_minute) is int
    second = cache(second_level={"url": URL, "encryption_key": KEY, "lookup_timeout_s": 0.01}).to_second_level()
    assert second == RedisLimits(URL, encryption_key=KEY, lookup_timeout_s=0.01)


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIMOE_CACHE_KEY", KEY)
    second = cache(second_level={"url": URL}).to_second_level()
    assert second is not None
    assert second.encryption_key == KEY


def test_what_is_live_holds_no_secret() -> None:
    """It becomes Serve's `user_config`, which status pages and logs show."""
    live = cache(second_level={"url": URL, "encryption_key": KEY}, ttl_s=5).live()
    assert live == {**CacheSettings(ttl_s=5).live()}
    assert CacheSettings(**live).to_limits() == CacheLimits(ttl_s=5)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"policy": "lfu"}, "lfu"),
        ({"min_bytes": -1}, "min_bytes"),
        ({"prefetch": {"speed": 1}}, "speed"),
        ({"prefetch": {"min_confidence": 2}}, "min_confidence"),
        ({"second_level": {"url": "http://x"}}, "url"),
        ({"second_level": {"url": URL, "encryption_key": "hunter2"}}, "encryption"),
        ({"second_level": {"url": URL, "compression": "gzip"}}, "compression"),
        ({"second_level": {"url": URL, "speed": 1}}, "speed"),
        ({"second_level": {}}, "url"),
        ({"second_level": {"url": URL, "encryption_key": 2**80}}, "encryption_key"),
        ({"second_level": {"url": [URL]}}, "url"),
    ],
)
def test_a_wrong_value_is_named_and_a_secret_is_not_shown(fields: dict[str, Any], word: str) -> None:
    with pytest.raises((pydantic.ValidationError, ConfigurationError)) as raised:
        cache(**fields)
    shown = f"{raised.value} {raised.value!r}"
    assert word in shown
    for secret in ("hunter2", str(2**80)):
        assert secret not in shown


def test_secrets_are_in_no_representation() -> None:
    settings = cache(second_level={"url": URL, "encryption_key": KEY})
    for shown in (repr(settings), str(settings), repr(settings.to_second_level())):
        assert "hunter2" not in shown
        assert KEY not in shown


@pytest.mark.parametrize("package", ["redis", "zstandard", "cryptography"])
def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"pimoe\[cache\]") as raised:
        cache(second_level={"url": URL, "encryption_key": KEY})
    assert package in raised.value.message
