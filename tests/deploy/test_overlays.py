"""What `kubectl kustomize` makes of overlays, canary and jobs: complete, valid, and in step with the service."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import ApiMetrics, HttpMetrics, WorkerMetrics, exposition, metric_names, new_registry
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "components" / "monitoring"
# Everything that is applied as a whole.
TARGETS = (
    "overlays/dev",
    "overlays/production",
    "overlays/production-hpa",
    "overlays/production-canary",
    "jobs/load",
    "jobs/publish",
    "jobs/train",
    "jobs/train/claim",
)
WITH_PODS = {"Deployment", "Job"}
SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")

Manifest = Mapping[str, Any]

each_target = pytest.mark.parametrize("target", TARGETS)


@cache
def rendered(target: str) -> tuple[Manifest, ...]:
    kubectl = tool("kubectl")
    done = subprocess.run([kubectl, "kustomize", target], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{ROOT / '.tools'}") or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (`make manifests` fetches it)")
    return found


def named(target: str, kind: str, name: str) -> Manifest:
    (found,) = (each for each in rendered(target) if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def containers(target: str) -> Iterator[tuple[Manifest, Manifest]]:
    """Every workload with its container."""
    for each in rendered(target):
        if each["kind"] in WITH_PODS:
            (container,) = each["spec"]["template"]["spec"]["containers"]
            yield each, container


@each_target
def test_everything_lives_in_the_one_namespace(target: str) -> None:
    for each in rendered(target):
        if each["kind"] == "Namespace":
            assert each["metadata"]["name"] == "padrec"
        else:
            assert each["metadata"]["namespace"] == "padrec"


@each_target
def test_names_are_unique_and_every_volume_claim_and_scaled_deployment_exists(target: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered(target)]
    assert len(names) == len(set(names))
    there = set(names) | {("PersistentVolumeClaim", n) for n in ("padrec-bundle", "padrec-training") if "job" in target}
    for workload, _ in containers(target):
        for volume in workload["spec"]["template"]["spec"]["volumes"] if "redis" not in str(workload) else ():
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there
    for each in rendered(target):
        if scaled := each["spec"].get("scaleTargetRef") if "spec" in each else None:
            assert ("Deployment", scaled["name"]) in there


@each_target
def test_what_kubernetes_itself_defines_fits_its_schemas(target: str, tmp_path: Path) -> None:
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (it is in the dev extra)")
    builtin = [each for each in rendered(target) if not re.search(r"keda\.sh|coreos\.com", each["apiVersion"])]
    path = tmp_path / "rendered.yaml"
    path.write_text(yaml.safe_dump_all(builtin))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "--quiet", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@each_target
def test_every_pod_meets_the_restricted_standard_and_is_bounded(target: str) -> None:
    for workload, container in containers(target):
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][bound])
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounts == {volume["name"] for volume in pod.get("volumes", ())}


@each_target
def test_every_variable_is_a_setting_with_a_valid_value(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, container in containers(target):
        with monkeypatch.context() as patch:
            for each in container.get("env", ()):
                assert each["name"].removeprefix("PADREC_").lower() in Settings.model_fields
                patch.setenv(each["name"], each["value"])
            Settings()


@each_target
def test_the_images_are_those_the_dockerfiles_say_how_to_build(target: str) -> None:
    said = " ".join(path.read_text() for path in (ROOT / "docker").glob("*.Dockerfile"))
    said += (DEPLOY / "jobs" / "train" / "kustomization.yaml").read_text()
    for workload, container in containers(target):
        images = [container["image"]]
        for volume in workload["spec"]["template"]["spec"].get("volumes", ()):
            images += [volume["image"]["reference"]] if "image" in volume else []
        for image in images:
            assert image.startswith("valkey/") or f"-t {image} " in said.replace("\n", " ")


def test_the_dev_overlay_needs_no_claim_and_no_gpu() -> None:
    text = json.dumps(rendered("overlays/dev"))
    assert "PersistentVolumeClaim" not in text and "persistentVolumeClaim" not in text and "nvidia" not in text
    assert {container["name"] for _, container in containers("overlays/dev")} == {"api", "worker", "redis", "publish"}


@pytest.mark.parametrize("target", ["overlays/production", "overlays/production-hpa"])
def test_production_workers_compute_on_the_one_gpu_they_ask_for(target: str) -> None:
    (container,) = named(target, "Deployment", "padrec-worker")["spec"]["template"]["spec"]["containers"]
    env = {each["name"]: each["value"] for each in container["env"]}
    assert env["PADREC_DEVICE"] == "cuda"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-cuda")


@pytest.mark.parametrize(
    ("target", "kind"),
    [("overlays/production", "ScaledObject"), ("overlays/production-hpa", "HorizontalPodAutoscaler")],
)
def test_who_scales_says_how_many_and_the_deployments_do_not(target: str, kind: str) -> None:
    scaled = {each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in rendered(target) if each["kind"] == kind}
    assert set(scaled) == {"padrec-api", "padrec-worker"}
    for name, spec in scaled.items():
        assert "replicas" not in named(target, "Deployment", name)["spec"]
        assert spec.get("minReplicas", spec.get("minReplicaCount")) >= 2


def test_both_scalers_keep_the_same_bounds_thresholds_and_paces() -> None:
    keda = {e["metadata"]["name"]: e["spec"] for e in rendered("overlays/production") if e["kind"] == "ScaledObject"}
    for name, spec in keda.items():
        hpa = named("overlays/production-hpa", "HorizontalPodAutoscaler", name)["spec"]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
        assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
        metrics = [(each["pods"]["metric"]["name"], each["pods"]["target"]["averageValue"]) for each in hpa["metrics"]]
        triggers = [(trigger["metadata"]["query"], trigger["metadata"]["threshold"]) for trigger in spec["triggers"]]
        for (metric, value), (query, threshold) in zip(metrics, triggers, strict=True):
            assert metric in query and value == threshold


def test_workers_are_added_before_their_rows_run_out() -> None:
    (container,) = named("overlays/production", "Deployment", "padrec-worker")["spec"]["template"]["spec"]["containers"]
    rows = int(next(each["value"] for each in container["env"] if each["name"] == "PADREC_NUM_ROWS"))
    triggers = named("overlays/production", "ScaledObject", "padrec-worker")["spec"]["triggers"]
    of_query = {trigger["metadata"]["query"]: trigger["metadata"]["threshold"] for trigger in triggers}
    (running,) = (threshold for query, threshold in of_query.items() if "padrec_running_requests" in query)
    assert int(running) == rows * 3 // 4


def test_no_answer_of_prometheus_takes_pods_away() -> None:
    for each in rendered("overlays/production"):
        if each["kind"] == "ScaledObject":
            assert each["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"
            assert all(trigger["metadata"]["ignoreNullValues"] == "false" for trigger in each["spec"]["triggers"])


def test_a_bundle_can_be_written_to_the_claim_the_pods_read() -> None:
    job = named("jobs/load", "Job", "padrec-load")["spec"]["template"]["spec"]
    (volume,), (mount,) = job["volumes"], job["containers"][0]["volumeMounts"]
    named("overlays/production", "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    assert not volume["persistentVolumeClaim"].get("readOnly") and not mount.get("readOnly")
    assert job["securityContext"]["fsGroup"] == job["securityContext"]["runAsUser"]


def test_the_canary_is_a_worker_behind_the_same_service_with_a_bundle_of_its_own() -> None:
    target = "overlays/production-canary"
    stable, canary = (named(target, "Deployment", f"padrec-worker{suffix}") for suffix in ("", "-canary"))
    service = named(target, "Service", "padrec-worker")["spec"]["selector"]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in (stable, canary)]
    assert all(service.items() <= each.items() for each in labels)
    for each, other in ((stable, labels[1]), (canary, labels[0])):
        assert not each["spec"]["selector"]["matchLabels"].items() <= other.items()
    claims = [each["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] for each in (stable, canary)]
    assert [claim["claimName"] for claim in claims] == ["padrec-bundle", "padrec-bundle-canary"]
    assert canary["spec"]["replicas"] == 1


def test_prometheus_scrapes_the_services_there_are_at_ports_they_have() -> None:
    (monitor,) = (each for each in rendered("overlays/production") if each["kind"] == "ServiceMonitor")
    (rule,) = monitor["spec"]["selector"]["matchExpressions"]
    services = [each for each in rendered("overlays/production") if each["kind"] == "Service"]
    chosen = [each for each in services if each["metadata"]["labels"]["app.kubernetes.io/name"] in rule["values"]]
    assert {each["metadata"]["name"] for each in chosen} == {"padrec", "padrec-worker"}
    for endpoint in monitor["spec"]["endpoints"]:
        assert all(endpoint["port"] in {port["name"] for port in each["spec"]["ports"]} for each in chosen)
        assert endpoint["path"] == "/metrics"


def rules() -> list[Manifest]:
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """Every PromQL expression of ours: alerts, dashboard, scalers."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    found += [rule["expr"] for rule in rules()]
    for each in rendered("overlays/production"):
        if each["kind"] == "ScaledObject":
            found += [trigger["metadata"]["query"] for trigger in each["spec"]["triggers"]]
    return found


def test_the_operator_s_rules_are_those_prometheus_reads() -> None:
    operator = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())["spec"]
    assert operator == yaml.safe_load((MONITORING / "rules.yaml").read_text())


def test_every_metric_an_expression_names_exists() -> None:
    exported = {f"{name.removesuffix('_total')}{suffix}" for name in metric_names() for suffix in SUFFIXES}
    named_somewhere = {name for text in expressions() for name in re.findall(r"\bpadrec_\w+", text)}
    assert named_somewhere <= exported
    assert len(named_somewhere) > 25


def test_every_metric_is_on_the_dashboard_or_says_why_not() -> None:
    dashboard = (MONITORING / "dashboard.json").read_text()
    missing = {name for name in metric_names() if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", dashboard)}
    assert missing == set()


def test_every_alert_has_its_lines_in_the_runbook_and_a_unit_test() -> None:
    headings = re.findall(r"^### (Padrec\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    alerts = [rule["alert"] for rule in rules()]
    assert headings == alerts
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == set(alerts)


def test_the_queue_alert_means_half_the_default_deadline() -> None:
    (rule,) = (rule for rule in rules() if rule["alert"] == "PadrecQueueOld")
    assert float(rule["expr"].rpartition(">")[2]) == Settings.model_fields["deadline_ms"].default / 2000


def test_the_dashboard_covers_every_part_and_places_no_panel_on_another() -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    parts = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert parts == ["Golden signals", "Queue and batch", "Speculation", "Cache", "Workers", "Models"]
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_promtool_accepts_every_expression_and_the_alerts_pass_their_unit_tests(tmp_path: Path) -> None:
    promtool = tool("promtool")
    plain = [text.replace("$__rate_interval", "1m").replace("$namespace", ".*") for text in expressions()]
    recorded = [{"record": f"expression:{n}", "expr": text} for n, text in enumerate(plain)]
    path = tmp_path / "expressions.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "expressions", "rules": recorded}]}))
    for command in (
        [promtool, "check", "rules", str(path)],
        [promtool, "check", "rules", str(MONITORING / "rules.yaml")],
        [promtool, "test", "rules", str(MONITORING / "rules_test.yaml")],
        [promtool, "check", "config", "--syntax-only", str(ROOT / "docker" / "prometheus.yaml")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("metrics", [ApiMetrics, WorkerMetrics])
def test_promtool_finds_nothing_wrong_with_what_is_exported(metrics: type[HttpMetrics]) -> None:
    registry = new_registry()
    metrics(registry)
    command = [tool("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=exposition(registry), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
