"""The compose file agrees with the images, the settings, the manifests and the files it mounts."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("api", "worker", "publish")


def test_the_services_are_those_of_the_page() -> None:
    assert set(SERVICES) == {"redis", "publish", "worker", "api", "prometheus", "grafana"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name not in OURS:  # ours name their user in the image
        assert service["user"] == "10001:0"


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_with_a_valid_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in SERVICES[name].get("environment", {}).items():
        assert variable.removeprefix("PADREC_").lower() in Settings.model_fields
        monkeypatch.setenv(variable, value)
    settings = Settings()
    for url in (settings.redis_url.get_secret_value(), *settings.worker_urls) if name == "api" else ():
        assert urlsplit(url).hostname in SERVICES


@pytest.mark.parametrize("name", OURS)
def test_a_container_has_the_time_to_finish(name: str) -> None:
    service = SERVICES[name]
    if "stop_grace_period" in service:
        finish = float(service["environment"]["PADREC_FINISH_SECONDS"])
        assert float(service["stop_grace_period"][:-1]) > finish + Settings.model_fields["drain_seconds"].default


def test_only_loopback_is_listened_on() -> None:
    published = {name: port for name, service in SERVICES.items() for port in service.get("ports", ())}
    assert set(published) == {"api", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published.values())


def test_what_is_mounted_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", volume).split(":")[0]
            assert (ROOT / "docker" / source).exists(), volume
            assert volume.endswith(":ro")


def test_valkey_is_the_one_of_the_manifests() -> None:
    manifest = (ROOT / "deploy" / "base" / "redis.yaml").read_text()
    assert SERVICES["redis"]["image"] in manifest


def test_the_gpu_file_changes_the_worker_only() -> None:
    gpu = yaml.safe_load((ROOT / "docker" / "compose.gpu.yaml").read_text())
    assert set(gpu["services"]) == {"worker"}
    assert gpu["services"]["worker"]["environment"] == {"PADREC_DEVICE": "cuda"}
    index = gpu["services"]["worker"]["build"]["args"]["TORCH_INDEX"]
    assert index in (ROOT / "docker" / "worker.Dockerfile").read_text()


def test_prometheus_scrapes_the_jobs_the_alerts_and_the_dashboard_ask_for() -> None:
    config = yaml.safe_load((ROOT / "docker" / "prometheus.yaml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["padrec", "padrec-worker"]
    api, worker = config["scrape_configs"]
    assert api["static_configs"][0]["targets"] == [f"api:{Settings.model_fields['port'].default}"]
    (discovery,) = worker["dns_sd_configs"]
    assert (discovery["names"], discovery["port"]) == (["worker"], 8001)


def test_grafana_finds_its_data_source_and_its_dashboard() -> None:
    folder = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert urlsplit(source["url"]).hostname in SERVICES
    (provider,) = yaml.safe_load((folder / "dashboards" / "padrec.yaml").read_text())["providers"]
    assert any(f":{provider['options']['path']}/" in volume for volume in SERVICES["grafana"]["volumes"])
