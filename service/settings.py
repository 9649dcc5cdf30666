"""Everything configurable, read once and frozen: flags over `PADREC_*` over a TOML file over defaults.

Both processes read the same settings; each uses the part it needs. Knows nothing of what the values are used for.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from service.redis_client import url_fault

CONFIG_VARIABLE = "PADREC_CONFIG"


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one line and names the setting."""


class Settings(BaseSettings):
    """Resolved settings of one process. Durations carry their unit in the name."""

    model_config = SettingsConfigDict(env_prefix="PADREC_", frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    metrics_port: int = Field(0, ge=0, le=65535, description="a port of its own for /metrics; 0: on the same port")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_seconds: float = Field(2.0, ge=0, le=120, description="after SIGTERM: time unready but still serving")
    finish_seconds: float = Field(10.0, ge=0, le=300, description="after that: time for running requests to finish")

    otlp_endpoint: str | None = Field(None, description="OTLP/HTTP collector to send traces to: http://host:4318")
    trace_percent: float = Field(1.0, ge=0, le=100, description="share of new traces sent; a caller's flag is obeyed")

    bundle: Path | None = Field(None, description="bundle folder")
    catalog_file: Path | None = Field(None, description="durable copy of the catalog for the API")
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// URL",
    )
    redis_timeout_ms: int = Field(50, ge=1, le=5000)
    worker_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        ("http://127.0.0.1:8001",),
        min_length=1,
        description="comma-separated worker URLs; a name stands for all its addresses",
    )
    worker_key: SecretStr | None = Field(
        None, description="secret between API and workers; of several, the API shows the first"
    )
    api_keys_file: Path | None = Field(None, description="keys and their scopes; once set, all but health needs one")
    poll_seconds: float = Field(
        0.5, gt=0, le=60, description="how often a process looks at Redis, and the API at its workers"
    )

    max_body_bytes: int = Field(1 << 20, ge=1024, le=1 << 26)
    body_seconds: float = Field(5.0, gt=0, le=60, description="time a client has to send its body")
    max_history_items: int = Field(1000, ge=1, le=10_000)
    max_exclude_items: int = Field(1000, ge=0, le=10_000)
    max_k: int = Field(100, ge=1, le=1000)
    default_k: int = Field(10, ge=1, le=1000)
    deadline_ms: int = Field(2000, ge=1, le=60_000, description="deadline of requests without one")
    max_in_flight: int = Field(256, ge=1, le=100_000, description="requests the API works on at once")
    lru_items: int = Field(100_000, ge=1, le=10_000_000, description="local cache entries each way")

    threads: int = Field(0, ge=0, le=1024, description="worker CPU threads; 0: cores less one")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d{1,2})?)$", description="where the worker decodes")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="the worker's precision")
    prefill_tokens: int = Field(512, ge=1, description="prompt tokens the worker reads between two rounds")
    num_rows: int = Field(32, ge=1, le=4096, description="requests the worker decodes at once")
    shadow_percent: float = Field(
        0.0, ge=0, le=100, description="share of lists written again without speculation, to compare"
    )
    measurements: Path | None = Field(
        None, description="file in which a worker's warm-up leaves what it measured, for the one that takes its place"
    )
    worker_yields: bool = Field(
        False, description="`padrec serve` on Linux: the worker computes only on cores that nothing else wants"
    )
    max_waiting: int = Field(128, ge=0, le=100_000, description="requests the worker lets wait")
    max_wait_ms: int = Field(10_000, ge=1, le=600_000, description="predicted wait the worker's line may reach")

    @field_validator("worker_urls", mode="before")
    @classmethod
    def _split_urls(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("worker_urls")
    @classmethod
    def _check_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("every worker URL must look like http://host:port")
        return tuple(url.rstrip("/") for url in value)

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError("must look like http://host:port")
        return value

    @field_validator("worker_key")
    @classmethod
    def _check_worker_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and any(len(key.strip()) < 16 for key in value.get_secret_value().split(",")):
            raise ValueError("must be at least 16 characters long, and so must each of several, between commas")
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: SecretStr) -> SecretStr:
        if fault := url_fault(value.get_secret_value()):
            raise ValueError(fault)
        return value

    @model_validator(mode="after")
    def _check_limits(self) -> "Settings":
        if self.default_k > self.max_k:
            raise ValueError("default_k must not exceed max_k")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config = getattr(init_settings, "init_kwargs", {}).pop("config_file", None)
        config = config or os.environ.get(CONFIG_VARIABLE) or None
        sources = (init_settings, env_settings)
        return (*sources, TomlConfigSettingsSource(settings_cls, config)) if config else sources

    @property
    def shown_worker_key(self) -> str:
        """The key shown to workers; empty where none is set."""
        return self.worker_key.get_secret_value().partition(",")[0].strip() if self.worker_key else ""

    def masked(self) -> dict[str, Any]:
        """The resolved settings as plain values, passwords replaced by `***`."""
        plain = self.model_dump(mode="json")
        plain["worker_key"] = "***" if self.worker_key else None
        plain["redis_url"] = mask_url(self.redis_url.get_secret_value())
        plain["otlp_endpoint"] = self.otlp_endpoint and mask_url(self.otlp_endpoint)
        plain["worker_urls"] = [mask_url(url) for url in self.worker_urls]
        return plain


def load_settings(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """Resolve the settings. `flags` set to None count as not given. Raises SettingsError."""
    given: dict[str, Any] = {name: value for name, value in (flags or {}).items() if value is not None}
    if config:
        given["config_file"] = config
    named = config or os.environ.get(CONFIG_VARIABLE)
    if named and not Path(named).is_file():
        raise SettingsError(f"setting 'config': no file at {named}")
    try:
        return Settings(**given)
    except ValidationError as exc:
        raise SettingsError(_one_line(exc)) from None
    except ValueError as exc:  # a TOML file that is no TOML
        raise SettingsError(f"setting 'config': {' '.join(str(exc).split())}") from None


def mask_url(url: str) -> str:
    """`url` without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}"))


def _one_line(exc: ValidationError) -> str:
    error = exc.errors(include_url=False, include_input=False)[0]
    name = str(error["loc"][0]) if error["loc"] else "default_k"
    reason = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if error["type"] == "extra_forbidden":
        return f"setting {name!r} is not known"
    return f"setting {name!r} (PADREC_{name.upper()}, --{name.replace('_', '-')}): {reason}"
