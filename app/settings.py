"""The settings of the serving API: one typed class, read once from the environment when a worker starts."""

import tempfile
from pathlib import Path

from pydantic import AliasChoices, Field, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What an operator may change, each by the environment variable named beside it.

    Raises pydantic's ValidationError, which names the variable, where a value does not fit.
    """

    model_config = SettingsConfigDict(env_prefix="WINEMON_", frozen=True, populate_by_name=True)

    artifacts_dir: Path = Path("artifacts")
    """WINEMON_ARTIFACTS_DIR: the trained model; relative to the release that is served."""

    metrics_dir: Path = Field(
        default_factory=lambda: Path(tempfile.mkdtemp(prefix="winemon-metrics-")),
        validation_alias=AliasChoices("PROMETHEUS_MULTIPROC_DIR"),
    )
    """PROMETHEUS_MULTIPROC_DIR: where workers share their counts; a tmpfs, emptied at each start."""

    slot: int = Field(default=0, ge=0)
    """WINEMON_SLOT: which shared metric files are this worker's; gunicorn.conf.py sets it, not people."""

    metrics_namespace: str = Field(default="fastapi", validation_alias=AliasChoices("METRICS_NAMESPACE"))
    """METRICS_NAMESPACE: first part of the names of the HTTP metrics and of the histogram of predictions."""

    metrics_subsystem: str = Field(default="monitoring", validation_alias=AliasChoices("METRICS_SUBSYSTEM"))
    """METRICS_SUBSYSTEM: second part of those names."""

    consoles: dict[str, str] = {}
    """WINEMON_CONSOLES: names and URLs of the other consoles, for the page at `/`, as a JSON object."""

    max_body_bytes: PositiveInt = 1024 * 1024
    """WINEMON_MAX_BODY_BYTES: a longer request body gets 413; a batch of 1,000 wines takes about 300 kB."""
