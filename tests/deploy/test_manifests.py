"""The base manifests agree with the images, the settings, the probes and each other; test_overlays.py has the rest."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service import __version__
from service.probes import Drain, Health, probe_routes
from service.settings import Settings

ROOT = Path(__file__).parents[2]
FILES = ("api", "bundle", "namespace", "network", "redis", "worker")
OURS = ("api", "worker")
PODS = ("api", "redis", "worker")
MIB = {"Mi": 1, "Gi": 1024}

Manifest = Mapping[str, Any]

each_pod = pytest.mark.parametrize("name", PODS)
each_of_ours = pytest.mark.parametrize("name", OURS)


@cache
def manifests(name: str) -> tuple[Manifest, ...]:
    folder = ROOT / "deploy" / "base"
    path = folder / "worker" / "worker.yaml" if name == "worker" else folder / f"{name}.yaml"
    return tuple(yaml.safe_load_all(path.read_text()))


def only(name: str, kind: str) -> Manifest:
    (found,) = (each for each in manifests(name) if each["kind"] == kind)
    return found


def pod_template(name: str) -> Manifest:
    template: Manifest = only(name, "Deployment")["spec"]["template"]
    return template


def pod(name: str) -> Manifest:
    spec: Manifest = pod_template(name)["spec"]
    return spec


def container(name: str) -> Manifest:
    found: Manifest
    (found,) = pod(name)["containers"]
    return found


def env(name: str) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(name).get("env", ())}


def settings(name: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the process resolves from the environment the manifest gives it."""
    for variable, value in env(name).items():
        monkeypatch.setenv(variable, value)
    return Settings()


def policy_of(name: str) -> Manifest:
    """The one policy that says who may talk to the pods of `name`."""
    (spec,) = (
        each["spec"]
        for each in manifests("network")
        if each["spec"]["podSelector"].get("matchLabels", {}).items() & pod_template(name)["metadata"]["labels"].items()
    )
    found: Manifest = spec
    return found


def ports(name: str) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(name)["ports"]}


def test_there_is_no_manifest_these_tests_do_not_read() -> None:
    stems = {path.stem for path in (ROOT / "deploy" / "base").rglob("*.yaml")}
    assert stems - {"kustomization"} == set(FILES)


@each_pod
def test_selectors_match_the_pods_they_mean_and_no_others(name: str) -> None:
    selectors = [
        only(name, "Deployment")["spec"]["selector"]["matchLabels"],
        only(name, "Service")["spec"]["selector"],
    ]
    for selector in selectors:
        matching = [each for each in PODS if selector.items() <= pod_template(each)["metadata"]["labels"].items()]
        assert matching == [name]


def test_only_our_own_pods_may_reach_the_cache() -> None:
    policy = policy_of("redis")
    (rule,) = policy["ingress"]
    peers = [each["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for each in rule["from"]]
    assert peers == ["padrec-api", "padrec-worker", "padrec-publish"]
    assert [port["port"] for port in rule["ports"]] == list(ports("redis"))


def test_the_api_may_ask_redis_and_workers_at_the_ports_they_have() -> None:
    allowed = {}
    for rule in policy_of("api")["egress"]:
        (peer,), (port,) = rule["to"], rule["ports"]
        allowed[peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"]] = port["port"]
    assert set(allowed) == {"padrec-redis", "padrec-worker"}
    assert allowed["padrec-redis"] in ports("redis") and allowed["padrec-worker"] in ports("worker")


def test_what_no_policy_allows_is_denied() -> None:
    (deny,) = (each["spec"] for each in manifests("network") if each["metadata"]["name"] == "padrec-default-deny")
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (rule,) = policy_of("worker")["egress"]
    (peer,) = rule["to"]
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "padrec-redis"}
    assert "egress" not in policy_of("redis")


@each_pod
def test_the_service_hands_on_to_the_container_s_named_ports(name: str) -> None:
    handed_on = only(name, "Service")["spec"]["ports"]
    assert ports(name) == {port["targetPort"]: port["port"] for port in handed_on}
    assert all(port["name"] == port["targetPort"] for port in handed_on)


@each_of_ours
def test_metrics_have_a_port_that_only_prometheus_reaches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys would shut Prometheus out of the port that callers use, and the scalers with it."""
    assert settings(name, monkeypatch).metrics_port == ports(name)["metrics"] != ports(name)["http"]
    (rule,) = (each for each in policy_of(name)["ingress"] if {"port": "metrics"} in each["ports"])
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert rule["ports"] == [{"port": "metrics"}]


def test_only_the_api_may_ask_a_worker() -> None:
    (rule,) = (each for each in policy_of("worker")["ingress"] if {"port": "http"} in each["ports"])
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "padrec-api"}}}]


@each_of_ours
def test_the_container_port_is_what_the_image_exposes_and_the_settings_say(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerfile = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    exposed = re.findall(r"^EXPOSE (\d+)$", dockerfile, re.MULTILINE)
    assert [str(ports(name)["http"])] == exposed
    assert settings(name, monkeypatch).port == ports(name)["http"]


@each_of_ours
def test_every_variable_is_a_setting_and_its_value_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {f"PADREC_{field.upper()}" for field in Settings.model_fields}
    assert set(env(name)) <= known
    assert settings(name, monkeypatch).host == "0.0.0.0"


def test_the_api_looks_for_redis_and_workers_where_their_services_are(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = settings("api", monkeypatch)
    named = {"redis": resolved.redis_url.get_secret_value(), "worker": resolved.worker_urls[0]}
    for name, url in named.items():
        service = only(name, "Service")
        wanted = (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
        assert (urlsplit(url).hostname, urlsplit(url).port) == wanted
    assert len(resolved.worker_urls) == 1


def test_the_bundle_is_mounted_read_only_where_both_processes_look(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = only("bundle", "PersistentVolumeClaim")["metadata"]["name"]
    for name in OURS:
        volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
        mounts = {mount["name"]: mount for mount in container(name)["volumeMounts"]}
        assert volumes["bundle"]["persistentVolumeClaim"] == {"claimName": claim, "readOnly": True}
        assert mounts["bundle"] == {"name": "bundle", "mountPath": "/bundle", "readOnly": True}
    assert settings("worker", monkeypatch).bundle == Path("/bundle")
    assert settings("api", monkeypatch).catalog_file == Path("/bundle/catalog.jsonl")


@each_of_ours
def test_every_probe_asks_a_route_the_process_has(name: str) -> None:
    healthy = Health(True, {})
    router = probe_routes(drain=Drain(), alive=lambda: healthy, ready=lambda: healthy, registry=CollectorRegistry())
    routes = {getattr(route, "path", "") for route in router.routes}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = container(name)[probe]["httpGet"]
        assert request["path"] in routes
        assert request["port"] in ports(name)
    assert container(name)["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container(name)["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_liveness_has_no_say_while_the_worker_warms_up() -> None:
    probe = container("worker")["startupProbe"]
    assert probe["httpGet"]["path"] == "/readyz"
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300


def test_the_cache_is_probed_on_the_port_it_listens_on() -> None:
    asked = container("redis")
    listening = asked["args"][asked["args"].index("--port") + 1]
    assert listening == str(ports("redis")["redis"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = asked[probe]["exec"]["command"]
        assert command == ["valkey-cli", "-e", "-p", listening, "ping"]


def test_the_cache_refuses_before_the_kernel_kills_it() -> None:
    asked = container("redis")
    bound = int(asked["args"][asked["args"].index("--maxmemory") + 1].removesuffix("mb"))
    assert bound < mebibytes(asked["resources"]["limits"]["memory"])


@each_pod
def test_pods_meet_the_restricted_security_standard(name: str) -> None:
    labels = only("namespace", "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    outer, inner = pod(name)["securityContext"], container(name)["securityContext"]
    assert outer["runAsNonRoot"] is True
    assert (outer["runAsUser"], outer["runAsGroup"]) == (10001, 0)
    assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inner == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(name)["automountServiceAccountToken"] is False


@each_of_ours
def test_pods_run_as_the_image_s_own_user(name: str) -> None:
    context = pod(name)["securityContext"]
    dockerfile = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile


@each_pod
def test_no_variable_of_kubernetes_can_pass_for_a_setting(name: str) -> None:
    assert pod(name)["enableServiceLinks"] is False


@each_pod
def test_requests_and_limits_are_stated(name: str) -> None:
    resources = container(name)["resources"]
    for bound in ("requests", "limits"):
        assert set(resources[bound]) == {"cpu", "memory"}
    assert mebibytes(resources["requests"]["memory"]) <= mebibytes(resources["limits"]["memory"])
    assert cores(resources["requests"]["cpu"]) <= cores(resources["limits"]["cpu"])


def test_the_worker_computes_on_fewer_threads_than_it_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = cores(container("worker")["resources"]["limits"]["cpu"])
    assert 1 <= settings("worker", monkeypatch).threads < limit


@each_of_ours
def test_a_pod_has_the_time_to_finish_what_it_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = settings(name, monkeypatch)
    unready = container(name)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert unready == 15
    assert pod(name)["terminationGracePeriodSeconds"] == 60
    assert unready + resolved.drain_seconds + resolved.finish_seconds + 5 <= 60
    assert resolved.finish_seconds * 1000 >= resolved.deadline_ms


@each_of_ours
def test_a_rollout_never_takes_a_ready_pod_away_first(name: str) -> None:
    strategy = only(name, "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


@each_of_ours
def test_the_image_is_this_version_of_this_process(name: str) -> None:
    assert container(name)["image"] == f"padrec-{name}:{__version__}"
    assert container(name)["args"] == [name]


def test_the_cache_s_image_is_pinned_by_digest() -> None:
    assert re.fullmatch(r"valkey/valkey:\d+\.\d+\.\d+-alpine@sha256:[0-9a-f]{64}", container("redis")["image"])


@each_of_ours
def test_pods_are_spread_and_evicted_one_at_a_time(name: str) -> None:
    labels = pod_template(name)["metadata"]["labels"]
    spread = pod(name)["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    budget = only(name, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    for selector in (budget["selector"], *(each["labelSelector"] for each in spread)):
        assert selector["matchLabels"].items() <= labels.items()


def test_the_worker_s_service_names_every_worker_instead_of_one_address() -> None:
    assert only("worker", "Service")["spec"]["clusterIP"] == "None"


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * MIB[quantity[-2:]]


def cores(quantity: str) -> float:
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
