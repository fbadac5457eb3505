"""Reads deploy/k8s and ray_cluster.yaml: they fit their schemas, what they name exists, pods have no rights that they
do not need, and no file holds a secret."""

from __future__ import annotations

import copy
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deploy import proxy
from tests.contract.manifests import (
    FOLDER,
    OVERLAYS,
    ROOT,
    Manifest,
    containers,
    kustomizations,
    manifests,
    named,
    pods,
    problems,
    rendered,
    renderer,
    walk,
)

RUNS, SERVICE = ("RayCluster", "cca-runs"), ("RayService", "cca")
PAGE = (ROOT / "docs" / "cluster.md").read_text()
with_kustomize = pytest.mark.skipif(renderer() is None, reason="neither kustomize nor kubectl is installed")
#: Settings of deploy/serve.yaml that the service on Kubernetes has otherwise.
ELSEWHERE = {"proxy_location": "EveryNode", "host": "0.0.0.0", "keys": "/etc/cca/keys/keys.json"}


def every_manifest() -> list[Any]:
    return [
        pytest.param(one, id=f"{path.relative_to(FOLDER)} {one['kind']} {one['metadata']['name']}")
        for path, one in manifests()
    ]


@pytest.mark.parametrize("manifest", every_manifest())
def test_a_manifest_fits_its_schema(manifest):
    assert problems(manifest) == []


@pytest.mark.parametrize(
    ("which", "path", "value"),
    [
        (RUNS, "spec.headGroupSpec.rayStartParams.num-cpus", 0),
        (RUNS, "spec.workerGroupSpecs.0.maxReplica", 3),
        (RUNS, "spec.workerGroupSpecs.0.template.spec.containers.0.ressources", {}),
        (SERVICE, "spec.upgradeStrategy.type", "Blue"),
        (SERVICE, "spec.rayClusterConfig.authOptions.secret", "x"),
        (("Deployment", "mlflow"), "spec.template.spec.containers.0.ports.0.containerPort", "http"),
        (("PodMonitor", "cca"), "spec.podMetricsEndpoints.0.interval", "often"),
        (("NetworkPolicy", "deny-all"), "spec.podSelectors", {}),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_the_schemas_find_a_slip(which, path, value):
    manifest = copy.deepcopy(named(*which))
    *way, last = path.split(".")
    node = manifest
    for step in way:
        node = node[int(step) if step.isdigit() else step]
    node[last] = value
    assert len(problems(manifest)) == 1


def test_the_launcher_file_fits_rays_schema():
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    workers = {name: one for name, one in config["available_node_types"].items() if name != config["head_node_type"]}
    assert sum(one["max_workers"] for one in workers.values()) <= config["max_workers"]
    assert not any(config["available_node_types"]["head"]["resources"].values()), "work would be placed on the head"
    head = next(line for line in config["head_start_ray_commands"] if "--head" in line)
    assert {"--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(head.split())
    assert workers["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert workers["gpu"]["min_workers"] == 0
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"], "whoever reaches a port may run code"
    assert any(path.endswith(".ray/auth_token") for path in config["file_mounts"]), "the token reaches no node"


@pytest.mark.parametrize("which", [RUNS, SERVICE], ids=["runs", "service"])
def test_a_cluster_asks_for_a_token_and_its_head_has_no_work(which):
    spec = named(*which)["spec"]
    cluster = spec.get("rayClusterConfig", spec)
    assert cluster["authOptions"]["mode"] == "token"
    assert {"num-cpus": "0", "num-gpus": "0"}.items() <= cluster["headGroupSpec"]["rayStartParams"].items()


def test_gpu_nodes_come_and_go_on_the_spot_market():
    gpu = next(group for group in named(*RUNS)["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert gpu["minReplicas"] == gpu["replicas"] == 0
    assert named(*RUNS)["spec"]["enableInTreeAutoscaling"]
    assert "capacity-type: spot" in (FOLDER / "overlays" / "prod" / "kustomization.yaml").read_text()


# The service


def serve_config(text: str) -> Manifest:
    config = yaml.safe_load(text)
    ServeDeploySchema.model_validate(config)
    return config


def test_the_service_is_that_of_serve_yaml_but_for_addresses_and_keys():
    ours = serve_config((files("deploy") / "serve.yaml").read_text())
    theirs = serve_config(named(*SERVICE)["spec"]["serveConfigV2"])
    for node in walk(ours):
        node |= {name: value for name, value in ELSEWHERE.items() if name in node}
    assert theirs == ours


def test_the_model_is_all_that_stands_between_quotes():
    """Overlays put it there by splitting at the quotes."""
    service = named(*SERVICE)
    pieces = service["spec"]["serveConfigV2"].split("'")
    assert len(pieces) == 3
    assert pieces[1] == service["metadata"]["annotations"]["served-model"]


def test_an_upgrade_keeps_the_old_cluster_until_its_requests_have_ended():
    spec = named(*SERVICE)["spec"]
    longest = yaml.safe_load(spec["serveConfigV2"])["http_options"]["request_timeout_s"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["rayClusterDeletionDelaySeconds"] > longest
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > longest


def test_the_service_wraps_its_proxies_and_holds_no_storage_credentials():
    for container in containers(named(*SERVICE)):
        values = {one["name"]: one.get("value") for one in container["env"]}
        assert values[proxy.VARIABLE] == proxy.CALLBACK
        assert "cca-storage" not in str(container)
        assert "CCA_STORAGE" not in str(container)


def test_the_keys_are_mounted_where_the_service_looks():
    for _, spec in pods(named(*SERVICE)):
        folder = next(mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "keys")["mountPath"]
        assert ELSEWHERE["keys"] == f"{folder}/keys.json"


def test_the_alert_rules_are_those_of_deploy_prometheus():
    ours = yaml.safe_load((files("deploy") / "prometheus" / "rules.yaml").read_text())
    assert named("PrometheusRule", "cca-serving")["spec"] == ours


# What is named exists


def test_every_file_of_a_kustomization_exists_and_every_file_is_in_one():
    used = set()
    for path, one in kustomizations().items():
        for resource in one["resources"]:
            target = (path.parent / resource).resolve()
            assert target.exists(), f"{path}: {resource}"
            used.add(target)
    unused = {path for path, _ in manifests()} - used - {FOLDER / "run.yaml"}
    assert not unused


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_every_patch_changes_something_that_is_there(overlay):
    for patch in kustomizations()[overlay / "kustomization.yaml"]["patches"]:
        manifest = named(patch["target"]["kind"], patch["target"]["name"])
        for step in yaml.safe_load(patch["patch"]):
            *way, last = step["path"].strip("/").split("/")
            node: Any = manifest
            for name in way:
                node = node[int(name)] if isinstance(node, list) else node[name]
            if step["op"] != "add":
                assert node[int(last)] if isinstance(node, list) else last in node, step


@with_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_kustomize_makes_manifests_that_fit(overlay):
    made = rendered(overlay)
    assert [problem for manifest in made for problem in problems(manifest)] == []
    namespace = next(one["metadata"]["name"] for one in made if one["kind"] == "Namespace")
    assert {one["metadata"].get("namespace", namespace) for one in made} == {namespace}
    images = {container["image"] for one in made for container in containers(one)}
    assert not any(image.startswith("cca-pipeline") for image in images), "the overlay names no registry"


@with_kustomize
def test_an_overlay_chooses_the_model(tmp_path):
    """As a user does: one line of the overlay, and the serve configuration follows."""
    overlay = FOLDER / "overlays" / "prod"
    for path in [*FOLDER.glob("base/*"), *overlay.glob("*")]:
        target = tmp_path / path.relative_to(FOLDER)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text().replace('models:/cca-digits/1"', 'models:/cca-cats/7"'))
    service = next(one for one in rendered(tmp_path / "overlays" / "prod") if one["kind"] == "RayService")
    generator = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"][1]
    assert generator["user_config"]["model"] == "models:/cca-cats/7"


def test_config_maps_and_accounts_that_are_named_exist():
    made = {(one["kind"], one["metadata"]["name"]): one for _, one in manifests()}
    for _, one in manifests():
        for node in walk(one):
            for reference in ("configMapRef", "configMapKeyRef", "configMap"):
                if reference in node:
                    there = made["ConfigMap", node[reference]["name"]]["data"]
                    assert node[reference].get("key", next(iter(there))) in there
            if "serviceAccountName" in node:
                assert ("ServiceAccount", node["serviceAccountName"]) in made
        for _, spec in pods(one):
            volumes = {volume["name"] for volume in spec.get("volumes", [])}
            volumes |= {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])}
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def secrets_used() -> dict[str, set[str]]:
    """{secret: keys that a manifest asks it for by name}."""
    found: dict[str, set[str]] = {}
    for _, one in manifests():
        for node in walk(one):
            for reference in ("secretRef", "secretKeyRef"):
                if reference in node:
                    found.setdefault(node[reference]["name"], set()).update(filter(None, [node[reference].get("key")]))
            if "secretName" in node:
                key = {"auth_token"} if node.get("mode") == "token" else set()
                found.setdefault(node["secretName"], set()).update(key)
    return found


def secrets_explained() -> dict[str, set[str]]:
    """{secret: keys} of the table in docs/cluster.md."""
    rows = re.findall(r"^\| `([a-z-]+)` \| (`[^|]+`) \|", PAGE, re.M)
    return {name: set(re.findall(r"`([^`]+)`", keys)) for name, keys in rows}


def test_the_docs_name_every_secret_and_its_keys():
    used, explained = secrets_used(), secrets_explained()
    assert used.keys() == explained.keys()
    for name, keys in used.items():
        assert keys <= explained[name]
    for name in explained:
        assert re.search(rf"kubectl create secret generic {name} ", PAGE), f"no command makes {name}"


# Pods are shut


@pytest.mark.parametrize("manifest", [one for one in every_manifest() if any(pods(one.values[0]))])
def test_a_pod_has_no_rights_that_it_does_not_need(manifest):
    for _, spec in pods(manifest):
        context = spec["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not ({"hostNetwork", "hostPID", "hostIPC"} & spec.keys())
        assert not any("hostPath" in volume for volume in spec.get("volumes", []))
    autoscalers = (node["autoscalerOptions"] for node in walk(manifest) if "autoscalerOptions" in node)
    for one in [*containers(manifest), *autoscalers]:
        context = one["securityContext"]
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
        assert {"cpu", "memory"} <= one["resources"]["limits"].keys()


def test_servers_that_kuberay_does_not_watch_have_probes():
    for kind, name in (("Deployment", "mlflow"), ("StatefulSet", "mlflow-postgres")):
        for container in named(kind, name)["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_the_network_is_closed_but_for_ports_that_exist():
    policies = [one for _, one in manifests() if one["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in [one["spec"] for one in policies]
    ports: dict[str, set[int]] = {}
    for _, one in manifests():
        for metadata, spec in pods(one):
            found = ports.setdefault(metadata["labels"]["cca-component"], set())
            found |= {port["containerPort"] for container in spec["containers"] for port in container["ports"]}
    selected = [one["spec"]["podSelector"].get("matchLabels", {}).get("cca-component") for one in policies]
    assert ports.keys() == set(filter(None, selected))
    for policy in policies:
        own = ports.get(policy["spec"]["podSelector"].get("matchLabels", {}).get("cca-component", ""), set())
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule.get("ports", [])} <= own
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                if "podSelector" in peer:
                    theirs = ports[peer["podSelector"]["matchLabels"]["cca-component"]]
                    assert {port["port"] for port in rule.get("ports", [])} <= theirs


def test_prometheus_finds_its_port_on_every_pod_of_ray():
    monitor = named("PodMonitor", "cca")["spec"]
    selected = set(monitor["selector"]["matchExpressions"][0]["values"])
    for _, one in manifests():
        for metadata, spec in pods(one):
            names = {port["name"] for port in spec["containers"][0]["ports"]}
            assert ("metrics" in names) == (metadata["labels"]["cca-component"] in selected)


# No file holds a secret

SECRET = (
    re.compile(r"://[^\s/:@$]+:[^\s/@$]+@"),  # a password in an address
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(  # VARIABLE: value, in the forms of YAML, of Dockerfiles, of docker's options and of ini files
        r"^\s*-?\s*(?:--env |ENV |ARG )?(?:\{?name:\s*)?\w*(?:PASSWORD|password|TOKEN|SECRET\w*|ACCESS_KEY\w*)"
        r"(?:,\s*value)?\s*[:=]\s*[^\s{]",
        re.M,
    ),
)


def secrets_in(text: str) -> list[str]:
    return [match[0] for pattern in SECRET for match in pattern.finditer(text)]


def declarative_files() -> list[Path]:
    return [*sorted(FOLDER.rglob("*.yaml")), ROOT / "ray_cluster.yaml", ROOT / "deploy" / "Dockerfile"]


def test_no_file_holds_a_secret():
    assert not [one for _, one in manifests() if one["kind"] == "Secret"]
    for path in declarative_files():
        assert secrets_in(path.read_text()) == [], path
    for _, one in manifests():
        for node in walk(one):
            if re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY", str(node.get("name", ""))):
                assert "value" not in node, node["name"]


@pytest.mark.parametrize(
    "text",
    [
        "uri: postgresql://mlflow:hunter2@db/mlflow",
        "key: AKIAABCDEFGHIJKLMNOP",
        "-----BEGIN RSA PRIVATE KEY-----",
        "MLFLOW_TRACKING_PASSWORD: hunter2",
        "  - {name: RAY_AUTH_TOKEN, value: abc}",
        "ENV AWS_SECRET_ACCESS_KEY=abc",
        "    - --env MLFLOW_TRACKING_PASSWORD=abc",
        "admin_password = hunter2",
    ],
)
def test_the_check_finds(text):
    assert secrets_in(text)
